"""Figure 6 of the paper: language-model perplexity, here against token budget."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from quest_dist.figures import grid
from quest_dist.figures.caption import Caption
from quest_dist.figures.panels import Plotted
from quest_dist.table import Row


def takes(row: Row) -> bool:
    """Whether a row belongs in this figure."""
    return row.metric == "perplexity"


def draw(rows: Sequence[Row], caption: Caption) -> tuple[Figure, Plotted]:
    """One panel a text."""
    return grid.page("fig06", "Perplexity against token budget", rows, caption)
