"""Figure 8 of the paper: the kernels of one decode step's attention.

(a) estimating criticality, by page size and context, as a share of full attention's time; (b) full
attention and that to the selected tokens, by budget and context, as a multiple of full attention at
one context; (c) top-k, as a share of full attention's time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from quest_dist.figures import style, times
from quest_dist.figures.caption import Caption
from quest_dist.figures.panels import Plotted
from quest_dist.figures.paper import Verdict
from quest_dist.figures.times import Group, Value, entries, fact, scaled
from quest_dist.table import Row

NAME = "fig08"
PARTS = ("fig08a", "fig08b", "fig08_topk")
HEADS = ("Estimate, by page size", "Attention, by budget", "Top-k, by budget")
NOTES = (
    "Hollow, dotted: the paper, Figure 8 (digitised; top-k 5 to 10 us, printed), on an RTX 4090.",
    "Figures 8 and 9 of the paper disagree on the same kernel: full attention at 8K 205 and 156 us,"
    " a budget of 4096 108 and about 79 us; any run can match one of them, not both.",
)


def takes(row: Row) -> bool:
    """Whether a row belongs in this figure."""
    return row.task.startswith("kernels_") and row.method in times.METHODS


def draw(rows: Sequence[Row], caption: Caption) -> tuple[Figure, Plotted]:
    """Three panels a device."""
    title = "Kernels of a decode step's attention, relative to full attention"
    return times.page(NAME, title, rows, caption, HEADS, _draw, NOTES, PARTS)


def verdicts(rows: Sequence[Row]) -> dict[str, Verdict]:
    """Of each part."""
    figure = style.canvas(3.0)
    plotted = [
        line
        for group in times.groups(rows)
        for line in _draw([figure.add_subplot() for _ in HEADS], group)
    ]
    return {part: times.overall(NAME, rows, plotted, part) for part in PARTS}


def _draw(panels: list[Axes], group: Group) -> Plotted:
    first, second, third = panels
    contexts = group.contexts or [1024]
    plotted = [*_estimate(first, group), *_attend(second, group), *_topk(third, group)]
    for axes in panels:
        style.budget_axis(axes, contexts)
        axes.set_xlabel("context, tokens")
        if axes.get_legend_handles_labels()[0]:
            how: dict[str, Any] = {"frameon": True, "framealpha": 0.85, "edgecolor": "none"}
            how |= {"fontsize": 7, "handlelength": 1.6, "labelspacing": 0.3, "borderaxespad": 0.1}
            axes.legend(**how).set_zorder(9)
        _fit(axes)
    return plotted


def _fit(axes: Axes) -> None:
    """Let the marks, not their intervals, say how high the panel is: one disturbed repeat would
    flatten all lines."""
    marks: list[Any] = [line.get_ydata() for line in axes.lines]
    seen = [float(y) for line in marks for y in line if 0 < float(y) < math.inf]
    if not seen:
        return
    if axes.get_yscale() == "log":
        axes.set_ylim(min(seen) / 1.5, max(seen) * 2.2)
    else:
        axes.set_ylim(0, max(seen) * 1.25)


def _estimate(axes: Axes, group: Group) -> Plotted:
    known, plotted = times.setting(NAME)["estimate_of_full"], []
    pages = sorted({row.page_size for row in group.rows if row.budget is not None})
    for page_size, color in zip(pages, _shades(len(pages)), strict=True):
        values: dict[int, Value] = {}
        for context in group.contexts:
            sparse = group.sparse(context, page_size)
            row = next((r for r in sparse.values() if not math.isnan(r.fact("score_us"))), None)
            if row is None:
                continue
            values[context] = fact(row, "score_of_full")
            theirs = known.get(str(page_size), {}).get(str(context))
            plotted += entries(
                *(NAME, PARTS[0], group, row, "estimate / full attention"),
                *(values[context], fact(row, "score_us"), theirs, None),
            )
        _line(axes, values, color, f"page {page_size}")
        _hollow(axes, known.get(str(page_size), {}), color, group)
    axes.set_yscale("log")
    axes.set_ylabel("time / full attention's")
    return plotted


def _attend(axes: Axes, group: Group) -> Plotted:
    known = times.setting(NAME)
    shared = [c for c in group.contexts if group.full(c) and str(c) in known["full_us"]]
    if not shared:
        return []
    at = shared[-1]
    base = group.full(at)
    assert base is not None
    theirs = known["full_us"][str(at)]
    series: dict[int | None, dict[int, Row]] = {None: {}}
    for context in group.contexts:
        full = group.full(context)
        if full is not None:
            series[None][context] = full
        for kept, row in group.sparse(context).items():
            series.setdefault(kept, {})[context] = row
    plotted: Plotted = []
    colors = (style.INK, *_shades(len(series) - 1))
    for (budget, members), color in zip(series.items(), colors, strict=True):
        line = known["full_us"] if budget is None else known["attend_us"].get(str(budget), {})
        values = {}
        for context, row in members.items():
            time = fact(row, "attend_us")
            values[context] = scaled(time, 1 / base.score)
            value = line.get(str(context))
            ratio = None if value is None else value / theirs
            quantity = f"attention / full attention at {at}"
            plotted += entries(
                *(NAME, PARTS[1], group, row, quantity, values[context], time, ratio, value)
            )
        _line(axes, values, color, "full" if budget is None else style.tokens(budget))
        _hollow(axes, {c: v / theirs for c, v in line.items()}, color, group)
    axes.set_yscale("log")
    axes.set_ylabel(f"time / full attention's at {style.tokens(at)}")
    return plotted


def _topk(axes: Axes, group: Group) -> Plotted:
    known, plotted = times.setting(NAME), []
    budgets = sorted({b for c in group.contexts for b in group.sparse(c)})
    for budget, color in zip(budgets, _shades(len(budgets)), strict=True):
        values = {}
        for context in group.contexts:
            row = group.sparse(context).get(budget)
            if row is None or math.isnan(row.fact("select_us")):
                continue
            values[context] = scaled(fact(row, "select_of_full"), 100)
            band = _band(known, context)
            middle = None if band is None else sum(band) / 2
            plotted += entries(
                *(NAME, PARTS[2], group, row, "top-k, % of full attention", values[context]),
                *(fact(row, "select_us"), middle, sum(known["topk_us"]) / 2),
            )
        _line(axes, values, color, style.tokens(budget))
    bands = {c: band for c in group.contexts if (band := _band(known, c)) is not None}
    for edge in (0, 1):
        _hollow(axes, {str(c): band[edge] for c, band in bands.items()}, style.INK, group)
    axes.set_ylabel("top-k, % of full attention's time")
    axes.set_ylim(bottom=0)
    return plotted


def _band(known: dict[str, dict[str, float]], context: int) -> tuple[float, float] | None:
    """The paper's 5 to 10 us as a share of its full attention, %."""
    full = known["full_us"].get(str(context))
    if full is None:
        return None
    low, high = known["topk_us"]
    return 100 * float(low) / full, 100 * float(high) / full


def _shades(count: int) -> list[str]:
    return [times.BLUES[min(i, len(times.BLUES) - 1)] for i in range(count)]


def _line(axes: Axes, values: dict[int, Value], color: str, label: str) -> None:
    if not values:
        return
    x = list(values)
    axes.plot(x, [v[0] for v in values.values()], "o-", color=color, ms=4, lw=1.8, label=label)
    for context, value in values.items():
        times.whisker(axes, context, value, color)


def _hollow(axes: Axes, values: dict[str, float], color: str, group: Group) -> None:
    """The paper's line over the contexts that we have."""
    inside = {int(c): v for c, v in values.items() if int(c) in group.contexts}
    axes.plot(
        list(inside), list(inside.values()), "o:", color=color, mfc="white", mec=color, ms=5, lw=0.9
    )
