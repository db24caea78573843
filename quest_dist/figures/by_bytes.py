"""Score against bytes of the KV cache: the layout that pareto_moved and pareto_held share.

Bytes are of all layers of one row, dense ones included, as methods count them (methods/traffic.py):
what is fetched for one decoded token, or what must be held to go on. A method that has no token
budget is one dot. The grey steps join the points that no other beats in both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from quest_dist import stats
from quest_dist.figures import beyond, panels, style
from quest_dist.figures import caption as captions
from quest_dist.figures.caption import Caption
from quest_dist.table import Line, Panel, Row, pivot

TALL, LEGEND, NEXT = 3.1, 0.34, 0.19  # inches of a panel, of the legend's first and further lines
MIB = 2.0**20


def page(
    name: str, title: str, axis: str, fact: str, rows: Sequence[Row], caption: Caption
) -> tuple[Figure, panels.Plotted]:
    """One panel a task and setting, two in a line; x is `fact` in MiB."""
    found = pivot(rows)
    across = min(2, len(found))
    down = -(-len(found) // across)
    handles = _legend(found)
    notes = [
        "Bars: 95 % intervals over samples (perplexity: of the difference from full)",
        "Grey steps: the points that no other beats in score and bytes; two points whose intervals"
        " overlap are not told apart.",
    ]
    if any(_overflows(panel, fact) for panel in found):
        notes.append(beyond.NOTE)
    lines = len(captions.small_print(rows, caption, [*notes, captions.lacking(rows)]))
    widest = max(0.62 + 0.073 * len(str(handle.get_label())) for handle in handles)
    columns = max(1, min(len(handles), int(style.WIDTH / widest)))
    legend = LEGEND + NEXT * (-(-len(handles) // columns) - 1)
    height = captions.HEAD + legend + 0.5 + lines * captions.LINE + down * TALL
    figure = style.canvas(height)
    bottom, top = captions.put(figure, title, rows, caption, notes)
    top -= legend / height
    box = {"left": 0.065, "right": 0.985, "bottom": bottom + 0.42 / height}
    spec = figure.add_gridspec(
        down, across, top=top - 0.24 / height, hspace=0.36, wspace=0.18, **box
    )
    plotted: panels.Plotted = []
    for place, panel in enumerate(found):
        axes = figure.add_subplot(spec[place // across, place % across])
        plotted += _panel(axes, panel, name, fact)
        axes.set_xlabel(axis if place + across >= len(found) else "")
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0.005, top + (legend + 0.02) / height),
        ncols=columns, handlelength=2.0, columnspacing=1.3, handletextpad=0.5, borderaxespad=0.2,
    )  # fmt: skip
    return figure, plotted


def front(dots: Sequence[tuple[float, float]], lower: bool) -> list[tuple[float, float]]:
    """The (bytes, score) that no other beats in both, by bytes; `lower`: lower is better."""
    best: list[tuple[float, float]] = []
    for size, score in sorted(dots, key=lambda dot: (dot[0], dot[1] if lower else -dot[1])):
        if not best or (score < best[-1][1] if lower else score > best[-1][1]):
            best.append((size, score))
    return best


def _panel(axes: Axes, panel: Panel, figure: str, fact: str) -> panels.Plotted:
    axes.set_title(_title(panel), loc="left", weight="bold", pad=6)
    axes.set_ylabel(panels.METRICS.get(panel.metric, panel.metric or "score"))
    axes.set_xscale("log", base=2)
    lower = panel.metric in stats.LOWER_IS_BETTER
    plotted: panels.Plotted = []
    drawn = _drawn(panel, fact)
    dots = [(row.fact(fact) / MIB, row.score) for _, rows in drawn for row in rows]
    end = math.inf
    if panel.metric == beyond.METRIC and dots:
        end = beyond.logarithmic(axes, [score for _, score in dots])
    for line, rows in sorted(drawn, key=lambda one: style.look(one[0].method).strong):
        if rows:
            plotted += _line(axes, line, rows, figure, fact, end)
    if not dots:
        where: dict[str, Any] = {"transform": axes.transAxes, "ha": "center", "va": "center"}
        axes.text(0.5, 0.5, "no results yet", color=style.FAINT, **where)
        return plotted
    steps = front(dots, lower)
    for entry in plotted:
        entry["front"] = (entry["mib"], entry["score"]) in steps
    last = max(size for size, _ in dots)
    x = [size for size, _ in steps] + [last]
    y = [score for _, score in steps] + [steps[-1][1]]
    axes.step(x, y, where="post", color="#c9c9c9", lw=4.0, zorder=1, solid_joinstyle="round")
    axes.xaxis.set_major_locator(LogLocator(base=2))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    return plotted


def _line(
    axes: Axes, line: Line, rows: Sequence[Row], figure: str, fact: str, end: float
) -> panels.Plotted:
    seen = style.look(line.method)
    x = [row.fact(fact) / MIB for row in rows]
    marker = seen.marker or "s"
    size = 6.0 if seen.strong else 4.8
    over = 5 if seen.strong else 3
    look: dict[str, Any] = {"color": seen.color, "lw": 2.0 if seen.strong else 1.1, "mew": 0}
    shown = [min(row.score, end) for row in rows]
    axes.plot(x, shown, marker=marker, ms=size, zorder=over, **look)
    beyond.mark(
        axes, [(at, row.score) for at, row in zip(x, rows, strict=True)], end, seen, size, over
    )
    ends = [panels.interval(row) for row in rows]
    low, high = zip(*ends, strict=True)
    axes.vlines(x, low, high, color=seen.color, lw=1.0, alpha=0.35, zorder=over - 2)
    return [
        panels.entry(figure, row, line.label, mib=row.fact(fact) / MIB, front=False) for row in rows
    ]


def _drawn(panel: Panel, fact: str) -> list[tuple[Line, list[Row]]]:
    """Lines with their rows that have a score and bytes."""
    return [
        (line, [row for row in _rows(line) if row.n and not math.isnan(row.fact(fact))])
        for line in panel.lines
    ]


def _overflows(panel: Panel, fact: str) -> bool:
    scores = [row.score for _, rows in _drawn(panel, fact) for row in rows]
    return beyond.overflows(panel.metric, scores)


def _rows(line: Line) -> list[Row]:
    own = [line.by_budget[budget] for budget in sorted(line.by_budget)]
    return own + ([line.flat] if line.flat is not None else [])


def _legend(found: Sequence[Panel]) -> list[Line2D]:
    handles: dict[str, Line2D] = {}
    for panel in found:
        for line in panel.lines:
            seen = style.look(line.method)
            look: dict[str, Any] = {"marker": seen.marker or "s", "ms": 6 if seen.strong else 4.8}
            handles.setdefault(
                line.label, Line2D([], [], color=seen.color, lw=1.4, label=line.label, **look)
            )
    return list(handles.values())


def _title(panel: Panel) -> str:
    return f"{panel.title} · {panel.model_label}"
