"""Figure 6 of the paper: running perplexity of books by position, and its difference from full.

The lines of the first panel nearly coincide, so the second shows each method minus full on the same
books, with its paired 95 % interval. Up to its budget a method attends to everything, and so must
coincide with full there: where a method that lists pages does not, the small print says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from quest_dist.details import Dot
from quest_dist.figures import caption as captions
from quest_dist.figures import panels, paper, style
from quest_dist.figures.caption import Caption
from quest_dist.figures.paper import Verdict
from quest_dist.table import Row, pivot

NAME = "fig06"
PANEL, LEGEND = 3.0, 0.36  # inches
#: The largest difference in perplexity, up to the budget, that arithmetic alone may make.
COINCIDES = 1e-6


def takes(row: Row) -> bool:
    """Whether a row belongs in this figure."""
    return row.metric == "perplexity"


def verdicts(rows: Sequence[Row]) -> dict[str, Verdict]:
    """The figure's verdict over the positions at which the paper's values were read."""
    return {NAME: paper.overall(NAME, [at(row, dot) for row in rows for dot in _read(row)] or rows)}


def draw(rows: Sequence[Row], caption: Caption) -> tuple[Figure, panels.Plotted]:
    """Two panels a text and setting, one line a method and budget."""
    found = pivot(rows)
    bands = "Bands: 95 % intervals of the difference from full on the same books"
    notes = [f"{bands}, cut where the lines would be lost" if _cut(rows) else bands]
    budgets = sorted({row.budget for row in rows if row.budget})
    said = ", ".join(map(str, budgets))
    notes.append(
        f"Token by token; a dotted line marks the budget ({said}), up to which every method "
        f"attends to everything. {coincidence(rows)}".strip()
    )
    notes.append(f"Against the paper: {verdicts(rows)[NAME]}.")
    lines = len(captions.small_print(rows, caption, [*notes, captions.lacking(rows)]))
    height = captions.HEAD + LEGEND + len(found) * PANEL + 0.5 + lines * captions.LINE
    figure = style.canvas(height)
    title = "Running perplexity by position"
    bottom, top = captions.put(figure, title, rows, caption, notes)
    top -= LEGEND / height
    spec = figure.add_gridspec(
        len(found),
        2,
        left=0.065,
        right=0.985,
        bottom=bottom + 0.42 / height,
        top=top - 0.2 / height,
        hspace=0.4,
        wspace=0.18,
    )
    plotted: panels.Plotted = []
    handles: dict[str, Line2D] = {}
    for place, panel in enumerate(found):
        values, differences = (figure.add_subplot(spec[place, side]) for side in (0, 1))
        members = [row for line in panel.lines for row in line.rows()]
        _head(values, differences, panel.title, members)
        for row in sorted(members, key=_over):
            label = _label(row, members)
            handles.setdefault(label, _handle(row, label, members))
            plotted += _lines(values, differences, row, label, members)
        _zoom(values, differences, members)
    order = sorted(handles.values(), key=lambda handle: handle.get_linestyle() == "--")
    if any(line["series"] == "paper" for line in plotted):
        order.append(panels.paper_handle())
    figure.legend(
        handles=order,
        loc="upper left",
        bbox_to_anchor=(0.005, top + (LEGEND + 0.02) / height),
        ncols=min(len(order), 7),
        handlelength=2.2,
        columnspacing=1.4,
    )
    return figure, plotted


def at(row: Row, dot: Dot) -> Row:
    """The row as if its text ended at a dot, to be judged there."""
    return replace(row, score=dot.value, low=dot.low, high=dot.high, n=dot.n, context_tokens=dot.x)


def coincidence(rows: Sequence[Row]) -> str:
    """What methods that attend to pages show up to their budget: a warning, or nothing.

    A budget of at least the length keeps all pages, so any difference there is a fault.
    """
    worst: dict[str, float] = {}
    for row in rows:
        early = [abs(dot.value) for dot in row.versus_full if row.budget and dot.x <= row.budget]
        if early and max(early) > COINCIDES:
            name = f"{row.label} {row.budget}"
            worst[name] = max(worst.get(name, 0.0), max(early))
    said = ", ".join(f"{name} by up to {value:.2g}" for name, value in worst.items())
    return (
        f"Contradiction: up to the budget there must be no difference, but {said}." if said else ""
    )


def _read(row: Row) -> list[Dot]:
    """The dots of a row at the positions where the paper's values were read."""
    wanted = [setting["context_tokens"] for setting in paper.reference()[NAME]]
    found = []
    for x in wanted:
        nearest = min(row.curve_dots, key=lambda dot: abs(dot.x - x), default=None)
        if nearest is not None and abs(nearest.x - x) <= 0.02 * x:
            found.append(nearest)
    return found


def _head(values: Axes, differences: Axes, title: str, members: Sequence[Row]) -> None:
    values.set_title(f"{title}: running perplexity", loc="left", weight="bold", pad=6)
    differences.set_title("minus full, same books", loc="left", weight="bold", pad=6)
    values.set_ylabel(panels.METRICS["perplexity"])
    differences.set_ylabel("perplexity difference")
    differences.axhline(0, color=style.INK, lw=1.2, ls=(0, (5, 2.5)), zorder=2)
    longest = max((dot.x for row in members for dot in row.curve_dots), default=1.0)
    for axes in (values, differences):
        axes.set_xlabel("position (tokens)")
        axes.set_xlim(0, longest * 1.02)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: style.tokens(round(x))))
        if longest > 1024:
            step = 2 ** math.floor(math.log2(longest / 4))
            axes.set_xticks([step * k for k in range(int(longest / step) + 1)])
        for budget in sorted({row.budget for row in members if row.budget}):
            axes.axvline(budget, color=style.FAINT, lw=0.8, ls=(0, (1, 2)), zorder=1)
    if not any(row.curve_dots for row in members):
        where: dict[str, Any] = {"transform": values.transAxes, "ha": "center", "va": "center"}
        values.text(0.5, 0.5, "no results yet", color=style.FAINT, **where)


def _lines(
    values: Axes, differences: Axes, row: Row, label: str, members: Sequence[Row]
) -> panels.Plotted:
    if not row.n:
        return []
    seen, dots = style.look(row.method), row.curve_dots
    versus = {dot.x: dot for dot in row.versus_full}
    look: dict[str, Any] = {"color": seen.color, "ls": _dash(row, members), "zorder": _over(row)}
    look["lw"] = 1.2 if row.budget is None else 2.0 if seen.strong else 1.3
    values.plot([dot.x for dot in dots], [dot.value for dot in dots], **look)
    xs = list(versus)
    differences.plot(xs, [versus[x].value for x in xs], **look)
    known = [x for x in xs if not math.isnan(versus[x].low)]
    differences.fill_between(
        known,
        [versus[x].low for x in known],
        [versus[x].high for x in known],
        color=seen.color,
        alpha=0.14,
        lw=0,
        zorder=1,
    )
    plotted = []
    read = _read(row)
    for dot in dots:
        there = at(row, dot)
        difference = versus.get(dot.x)
        more = {
            "position": dot.x,
            "low": dot.low,
            "high": dot.high,
            "interval": "score",
            "versus_full": difference.value if difference else math.nan,
            "versus_full_low": difference.low if difference else math.nan,
            "versus_full_high": difference.high if difference else math.nan,
        }
        plotted.append(panels.entry(NAME, there, label, **more))
        value = paper.judge(NAME, there).paper if dot in read else None
        if value is not None:
            mark: dict[str, Any] = {"mec": seen.color, "mfc": "none", "mew": 1.2, "zorder": 9}
            values.plot([dot.x], [value], seen.marker or "o", ms=6, clip_on=False, **mark)
            values.annotate(f"{value:g}", (dot.x, value), (-4, 5), textcoords="offset points")
            blank = dict.fromkeys(("versus_full", "versus_full_low", "versus_full_high"), math.nan)
            line = panels.paper_entry(NAME, there, label, value)
            plotted.append({**line, "position": dot.x, **blank})
    return plotted


def _reach(members: Sequence[Row]) -> tuple[float, float]:
    """The differences that are shown: where the lines run, and as much again on either side."""
    every = [dot.value for row in members for dot in row.versus_full] or [0.0]
    low, high = min(0.0, *every), max(0.0, *every)
    room = (high - low) or 1.0
    return low - room, high + room


def _cut(members: Sequence[Row]) -> bool:
    """Whether a band goes beyond what is shown."""
    low, high = _reach(members)
    return any(dot.low < low or dot.high > high for row in members for dot in row.versus_full)


def _zoom(values: Axes, differences: Axes, members: Sequence[Row]) -> None:
    """Show where the lines run once the first few positions, each of few tokens, are past."""
    differences.set_ylim(*_reach(members))
    every = [dot for row in members for dot in row.curve_dots]
    if not every:
        return
    longest = max(dot.x for dot in every)
    late = [dot.value for dot in every if dot.x >= 0.1 * longest]
    room = 0.08 * (max(late) - min(late)) or 1.0
    values.set_ylim(min(late) - room, max(late) + room)


def _label(row: Row, members: Sequence[Row]) -> str:
    several = len({other.budget for other in members if other.budget is not None}) > 1
    return f"{row.label}, {row.budget}" if several and row.budget is not None else row.label


def _handle(row: Row, label: str, members: Sequence[Row]) -> Line2D:
    seen = style.look(row.method)
    width = 1.2 if row.budget is None else 2.0 if seen.strong else 1.3
    return Line2D([], [], color=seen.color, lw=width, ls=_dash(row, members), label=label)


def _dash(row: Row, members: Sequence[Row]) -> Any:
    if row.budget is None:
        return (0, (5, 2.5))
    budgets = sorted({other.budget for other in members if other.budget is not None}, reverse=True)
    return style.DASHES[budgets.index(row.budget) % len(style.DASHES)]


def _over(row: Row) -> int:
    if row.budget is None:
        return 6
    return 5 if style.look(row.method).strong else 3
