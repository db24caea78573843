"""Figure 4 of the paper: recall of the tokens that dense attention scores highest, by budget."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from quest_dist import ordering
from quest_dist.figures import grid
from quest_dist.figures.caption import Caption
from quest_dist.figures.panels import Plotted
from quest_dist.table import Row


def takes(row: Row) -> bool:
    """Whether a row belongs in this figure."""
    return row.metric == "recall" or row.task.startswith("recall")


def draw(rows: Sequence[Row], caption: Caption) -> tuple[Figure, Plotted]:
    """One panel a task and setting, and in the small print whether the methods keep their order."""
    counted = sorted({f"{row.fact('top'):.0f}" for row in rows if row.fact("top") > 0})
    title = f"Recall of the top-{' and '.join(counted)} tokens" if counted else "Recall"
    notes = ["All methods are asked by the queries of one dense pass; Full is 100 by definition."]
    if any(row.method == "h2o" for row in rows):
        notes[0] += " H2O attends to everything in its first step."
    return grid.page("fig04", f"{title} by token budget", rows, caption, notes=[
        *notes, *(f"{said}." for said in ordering.statements(rows))
    ])  # fmt: skip
