"""Score against bytes held: what must be held of the KV cache to go on, over decode steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.figure import Figure

from quest_dist import stats
from quest_dist.figures import by_bytes
from quest_dist.figures.caption import Caption
from quest_dist.figures.panels import Plotted
from quest_dist.table import Row

FACT = "bytes_held"


def takes(row: Row) -> bool:
    """Whether a row belongs in this figure: it has a score of its own, and was weighed if run."""
    timed = row.metric in stats.TIMES
    return bool(row.point) and not timed and not (row.n and math.isnan(row.fact(FACT)))


def draw(rows: Sequence[Row], caption: Caption) -> tuple[Figure, Plotted]:
    """One panel a task, in the order of the rows."""
    return by_bytes.page(
        "pareto_held", "Score against bytes held", "MiB of KV cache held", FACT, rows, caption
    )
