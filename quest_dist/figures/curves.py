"""Score against token budget for whatever a sweep ran: the figure of sweeps without their own."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from quest_dist.figures import grid
from quest_dist.figures.caption import Caption
from quest_dist.figures.panels import Plotted
from quest_dist.table import Row


def takes(row: Row) -> bool:
    """Whether a row belongs in this figure: all do."""
    return bool(row.point)


def draw(rows: Sequence[Row], caption: Caption) -> tuple[Figure, Plotted]:
    """One panel a task, in the order of the rows."""
    return grid.page("curves", "Score against token budget", rows, caption)
