"""Figure 7 of the paper: LongBench score against token budget, one panel a task."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from quest_dist.figures import grid
from quest_dist.figures.caption import Caption
from quest_dist.figures.panels import Plotted
from quest_dist.table import Row

TASKS = ("qasper", "hotpotqa", "gov_report", "triviaqa", "narrativeqa", "multifieldqa_en")


def takes(row: Row) -> bool:
    """Whether a row belongs in this figure."""
    return row.task in TASKS


def draw(rows: Sequence[Row], caption: Caption) -> tuple[Figure, Plotted]:
    """Six panels in the paper's order, as many as there are."""
    return grid.page("fig07", "LongBench: score against token budget", rows, caption, TASKS)
