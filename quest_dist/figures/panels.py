"""Panels of score against token budget: the shape that most of the paper's figures have.

Invariants: x is log2 of the budget, ticks are budgets that were run; full attention and methods
without a budget are dashed levels, not dots; every mark carries its interval as a bar, and the
lines of a panel are moved a little apart so that bars can be told; hollow marks are the paper's,
never ours, but for those that stand at an axis's end (see beyond). What is plotted is returned as
plain dicts, and that is the CSV.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from quest_dist.figures import beyond, paper, style
from quest_dist.table import Line, Panel, Row

METRICS = {
    "f1": "F1",
    "rouge_l": "ROUGE-L",
    "accuracy": "accuracy, %",
    "string_match_all": "answers found, %",
    "recall": "recall, %",
    "attention": "attention, %",
    "perplexity": "perplexity (lower is better)",
    "nll_increase": "increase in nats (lower is better)",
    "attention_us": "attention, µs a step (lower is better)",
    "step_ms": "ms a token (lower is better)",
    "tokens_per_pass": "tokens a target pass",
}
#: Dashes of a level, and octaves between the marks of two.
LEVEL, STEP = (0, (5, 2.5)), 0.05
Plotted = list[dict[str, Any]]


def draw(axes: Axes, panel: Panel, figure: str, title: str, apart: float = 0.1) -> Plotted:
    """Draw one panel; return what was plotted. `apart`: octaves that lines are moved, at most."""
    plotted: Plotted = []
    budgets = list(panel.budgets) or [1]
    style.budget_axis(axes, budgets)
    axes.set_title(title, loc="left", weight="bold", pad=6)
    axes.set_ylabel(METRICS.get(panel.metric, panel.metric or "score"))
    lines = sorted(panel.lines, key=lambda line: style.look(line.method).strong)
    curves = [line for line in lines if line.by_budget]
    levels = [(line, line.flat) for line in lines if line.flat is not None]
    scores = scores_of(panel)
    far = beyond.overflows(panel.metric, scores)
    end = beyond.logarithmic(axes, scores) if far else math.inf
    for i, (line, row) in enumerate(levels):
        plotted += _level(axes, line, row, figure, i)
    for i, line in enumerate(curves):
        moved = 0.0 if len(curves) < 2 else apart * (2 * i / (len(curves) - 1) - 1)
        plotted += _curve(axes, line, figure, moved, _dash(line, curves), end)
    if not far:
        _scale(axes, panel.metric, plotted)
    _failures(axes, lines)
    return plotted


def scores_of(panel: Panel) -> list[float]:
    """All scores of a panel."""
    rows = [row for line in panel.lines for row in (*line.by_budget.values(), line.flat) if row]
    return [row.score for row in rows if row.n]


def interval(row: Row) -> tuple[float, float]:
    """The ends of a mark's bar.

    Texts differ far more in perplexity than methods do on one text, so a perplexity's bar is the
    interval of its difference from full on the same samples, put at full's value on them; a
    score's bar (and a perplexity's without full beside it) is its own interval.
    """
    if not paired(row):
        return row.low, row.high
    full = row.score - row.delta
    return full + row.delta_low, full + row.delta_high


def paired(row: Row) -> bool:
    """Whether a row's bar is that of its difference from full."""
    return row.metric == "perplexity" and not math.isnan(row.delta)


def legend(panels: Sequence[Panel]) -> list[Line2D]:
    """One handle a line over all panels, in the order baselines, Quest, ours, full."""
    found: dict[str, Line2D] = {}
    for panel in panels:
        curves = [line for line in panel.lines if line.by_budget]
        for line in panel.lines:
            found.setdefault(line.label, handle(line, _dash(line, curves)))
    strong = {line.label: _rank(line) for panel in panels for line in panel.lines}
    return [found[label] for label in sorted(found, key=lambda label: strong[label])]


def handle(line: Line, dash: Any = "-") -> Line2D:
    """The legend's picture of a line."""
    seen = style.look(line.method)
    if not line.by_budget:
        look: dict[str, Any] = {"marker": seen.marker, "ms": 4.8, "label": line.label}
        return Line2D([], [], color=seen.color, lw=1.3, ls=LEVEL, **look)
    width, size = (2.2, 6.0) if seen.strong else (1.3, 4.8)
    return Line2D(
        [], [], color=seen.color, lw=width, ls=dash, marker=seen.marker, ms=size, label=line.label
    )


def paper_handle() -> Line2D:
    """The legend's picture of the paper's marks."""
    return Line2D(
        [], [], color="none", marker="o", ms=5.5, mec=style.INK, mfc="none", label="paper (hollow)"
    )


def entry(figure: str, row: Row, label: str, **changes: Any) -> dict[str, Any]:
    """A CSV line: what was plotted for a point, and the verdict on it."""
    verdict = paper.judge(figure, row)
    low, high = interval(row)
    return {
        "series": "measured",
        "task": row.task,
        "model": row.model,
        "data": row.data,
        "method": row.method,
        "label": label,
        "budget": row.budget,
        "metric": row.metric,
        "score": row.score,
        "low": low,
        "high": high,
        "interval": "difference from full" if paired(row) else "score",
        "n": row.n,
        "n_expected": row.n_expected,
        "status": row.status,
        "verdict": verdict.verdict,
        "reason": verdict.reason,
        "point": row.point,
    } | changes


def paper_entry(figure: str, row: Row, label: str, value: float) -> dict[str, Any]:
    """A CSV line of a paper's mark."""
    blank = {
        "low": math.nan,
        "high": math.nan,
        "interval": "",
        "n": None,
        "n_expected": None,
        "status": "",
    }
    return entry(figure, row, label, series="paper", score=value, **blank)


def _level(axes: Axes, line: Line, row: Row, figure: str, place: int) -> Plotted:
    """A level whose mark and bar stand at the left, `place` steps from the edge."""
    if not row.n:
        return []
    seen, full = style.look(line.method), line.method == "full"
    axes.axhline(row.score, color=seen.color, lw=1.2, ls=LEVEL, zorder=6 if full else 4)
    at = axes.get_xlim()[0] * 2 ** (STEP * place)
    if not full:
        axes.plot([at], [row.score], marker=seen.marker, ms=4.8, mew=0, color=seen.color, zorder=5)
    low, high = interval(row)
    if low < high:
        bar: dict[str, Any] = {"lw": 2.4 if full else 1.2, "alpha": 0.55, "clip_on": not full}
        axes.vlines([at], low, high, color=seen.color, **bar)
    plotted = [entry(figure, row, line.label)]
    value = paper.judge(figure, row).paper
    if value is not None:
        right = axes.get_xlim()[1]
        axes.plot([right], [value], "<", ms=6, mec=style.INK, mfc="white", clip_on=False, zorder=7)
        plotted.append(paper_entry(figure, row, line.label, value))
    return plotted


def _curve(axes: Axes, line: Line, figure: str, apart: float, dash: Any, end: float) -> Plotted:
    seen = style.look(line.method)
    rows = [row for row in line.by_budget.values() if row.n]
    x = [(row.budget or 1) * 2**apart for row in rows]
    y = [min(row.score, end) for row in rows]
    width, size = (2.2, 5.2) if seen.strong else (1.3, 4.2)
    over = 5 if seen.strong else 3
    axes.plot(
        x, y, color=seen.color, lw=width, ls=dash, marker=seen.marker, ms=size, mew=0, zorder=over
    )
    beyond.mark(
        axes, [(at, row.score) for at, row in zip(x, rows, strict=True)], end, seen, size, over
    )
    ends = [interval(row) for row in rows]
    axes.vlines(
        x,
        [low for low, _ in ends],
        [high for _, high in ends],
        color=seen.color,
        lw=1.5 if seen.strong else 0.9,
        alpha=0.5,
        zorder=over - 2,
    )
    plotted = []
    for row in rows:
        plotted.append(entry(figure, row, line.label))
        value = paper.judge(figure, row).paper
        if value is not None and row.budget:
            mark: dict[str, Any] = {"marker": seen.marker, "ms": size + 1.8, "zorder": 6}
            axes.plot(
                [row.budget * 2**apart], [value], mec=seen.color, mfc="none", mew=1.2, ls="", **mark
            )
            plotted.append(paper_entry(figure, row, line.label, value))
    return plotted


def _scale(axes: Axes, metric: str, plotted: Plotted) -> None:
    """Scores start at zero and show every interval; perplexity and recall, which is near 100 where
    methods are worth comparing, show their own range."""
    known = ("score", "low", "high")
    values = [e[k] for e in plotted for k in known if e[k] is not None and not math.isnan(e[k])]
    if not values:
        axes.set_yticks([])
        where: dict[str, Any] = {"transform": axes.transAxes, "ha": "center", "va": "center"}
        axes.text(0.5, 0.5, "no results yet", color=style.FAINT, **where)
        return
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 1.0
    if metric == "perplexity":
        axes.set_ylim(low - room, high + room)
    elif metric == "recall":
        axes.set_ylim(max(low - room, -3.0), high + room)
    else:
        top = min(high + room, 104.0) if metric in METRICS else high + room
        axes.set_ylim(min(-0.03 * top, low - room if low < 0 else 0.0), top)


def _failures(axes: Axes, lines: Sequence[Line]) -> None:
    """A cross on the axis, in the method's colour, where a point failed without any result."""
    for line in lines:
        for budget, row in line.by_budget.items():
            if row.status == "failed" and not row.n:
                mark: dict[str, Any] = {"marker": "x", "ms": 6, "mew": 1.8, "clip_on": False}
                color = style.look(line.method).color
                axes.plot([budget], [axes.get_ylim()[0]], color=color, zorder=8, **mark)


def _dash(line: Line, curves: Sequence[Line]) -> Any:
    """Lines of one method in one panel differ by their dashes."""
    same = [other.label for other in curves if other.method == line.method]
    place = same.index(line.label) if line.label in same else 0
    return style.DASHES[place % len(style.DASHES)]


def _rank(line: Line) -> tuple[int, str]:
    if line.method == "full" or not line.by_budget:
        return (3, line.label)
    return ({"quest": 1, "tightbound": 2}.get(line.method, 0), "")
