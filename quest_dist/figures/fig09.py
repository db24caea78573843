"""Figure 9 of the paper: where the time of self-attention goes, by context and budget.

Stacks of estimate, top-k and attend as three ops, relative to full attention at the same context;
the line on a stack is the whole step as one op, whose speed-up stands above.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from quest_dist.figures import bars, style, times
from quest_dist.figures.caption import Caption
from quest_dist.figures.panels import Plotted
from quest_dist.figures.paper import Verdict
from quest_dist.figures.times import Group, Value, entries, fact, inverse
from quest_dist.table import Row

NAME = "fig09"
CONTEXTS = (8192, 16384, 32768)
BUDGETS = (1024, 2048, 4096)
PARTS = {"estimate": "score", "top-k": "select", "attend": "attend"}
COLORS = ("#9ecae1", "#e6a35c", "#3182bd")
NOTES = (
    "Stacks: estimate, top-k and attend as three ops; the line across is the step as one op, with"
    " its speed-up over full attention. Hatched: the paper, Figure 9 (digitised, +-2 us), on an RTX"
    " 4090.",
    "The paper prints 1.69x, 2.92x and 4.86x for a budget of 4096; its 7.03x is 2048 at 32K. Its"
    " Figures 8 and 9 disagree on the same kernel (full attention at 8K: 205 and 156 us).",
)


def takes(row: Row) -> bool:
    """Whether a row belongs in this figure."""
    if not row.task.startswith("kernels_") or row.method not in times.METHODS:
        return False
    # A row that was not run yet knows no context but by its task.
    where = {f"kernels_{context // 1024}k" for context in CONTEXTS}
    return row.page_size == 16 and row.budget in (None, *BUDGETS) and row.task in where


def draw(rows: Sequence[Row], caption: Caption) -> tuple[Figure, Plotted]:
    """A panel a context, for each device."""
    heads = [f"{style.tokens(context)} tokens" for context in CONTEXTS]
    title = "Self-attention of one layer by its parts, relative to full attention"
    return times.page(NAME, title, rows, caption, heads, _draw, NOTES, [NAME])


def verdicts(rows: Sequence[Row]) -> dict[str, Verdict]:
    """Of the figure."""
    figure = style.canvas(3.0)
    plotted = [
        line
        for group in times.groups(rows)
        for line in _draw([figure.add_subplot() for _ in CONTEXTS], group)
    ]
    return {NAME: times.overall(NAME, rows, plotted, NAME)}


def _draw(panels: list[Axes], group: Group) -> Plotted:
    plotted: Plotted = []
    for axes, context in zip(panels, CONTEXTS, strict=True):
        plotted += _panel(axes, group, context)
    panels[0].set_ylabel("time / full attention's")
    handles, labels = panels[0].get_legend_handles_labels()
    if handles:
        how = {"fontsize": 7, "handlelength": 1.4, "labelspacing": 0.3, "borderaxespad": 0.1}
        panels[0].legend(handles, labels, loc="upper right", ncols=2, **how)
    return plotted


def _panel(axes: Axes, group: Group, context: int) -> Plotted:
    known = times.setting(NAME)["parts_us"][str(context)]
    their_full = sum(known["full"])
    full, sparse = group.full(context), group.sparse(context)
    plotted: Plotted = []
    columns: list[tuple[str, Row | None]] = [("full", full)]
    columns += [(str(budget), sparse.get(budget)) for budget in BUDGETS]
    for place, (name, row) in enumerate(columns):
        stack = [part / their_full for part in known[name]]
        theirs = sum(stack)
        bars.papers(axes, place + 0.2, stack, "paper (RTX 4090)")
        if row is None or full is None:
            bars.said(axes, place - 0.2, 0.0, "not run", style.WARN)
            continue
        ours: Value = (1.0, math.nan, math.nan)
        if row is full:
            bars.ours(axes, place - 0.2, [("attend", 1.0, COLORS[-1])], ours)
        else:
            ours = inverse(fact(row, "speedup"))
            parts = [
                (part, row.fact(f"{word}_of_full"), color)
                for (part, word), color in zip(PARTS.items(), COLORS, strict=True)
            ]
            bars.ours(axes, place - 0.2, parts, ours)
            left, right = place - 0.2 - bars.WIDTH / 2, place - 0.2 + bars.WIDTH / 2
            axes.hlines([ours[0]], left, right, color=style.INK, lw=1.6, zorder=5)
            over = [ours[0], sum(height for _, height, _ in parts), ours[2]]
            top = max(height for height in over if not math.isnan(height))
            bars.said(axes, place - 0.2, top, f"{1 / ours[0]:.2f}x")
            bars.said(axes, place + 0.2, theirs, f"{1 / theirs:.2f}x", style.FAINT)
        time = (row.score, row.low, row.high)
        quantity = "self-attention / full attention"
        plotted += entries(NAME, NAME, group, row, quantity, ours, time, theirs, sum(known[name]))
        for part, word in PARTS.items() if row is not full else ():
            named = f"{part} / full attention"
            value = known[name][list(PARTS).index(part)]
            line = entries(
                *(NAME, "parts", group, row, named, fact(row, f"{word}_of_full")),
                *(fact(row, f"{word}_us"), value / their_full, value),
            )
            plotted += line
    bars.ticks(axes, range(len(columns)), ["full", *(style.tokens(b) for b in BUDGETS)])
    axes.set_xlabel("token budget")
    return plotted
