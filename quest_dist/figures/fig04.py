"""Figure 4 of the paper: recall of the tokens that dense attention scores highest, by budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

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
    note = (
        "All methods are asked by the queries of one dense pass. What selects the tokens of highest"
    )
    note += " score, or all, has 100 by definition and no bar."
    if any(row.method == "h2o" for row in rows):
        note += " H2O attends to everything in its first step."
    order = [f"{said}." for said in ordering.statements(rows)]
    shown = [_certain(row) for row in rows]
    return grid.page("fig04", f"{title} by token budget", shown, caption, notes=[note, *order])


def _certain(row: Row) -> Row:
    """A row whose recall is 100 whatever the sample, with an interval that says so."""
    if row.n and row.score == 100 and row.method in ("full", "oracle_token"):
        return replace(row, low=row.score, high=row.score)
    return row
