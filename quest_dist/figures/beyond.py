"""Perplexities far beyond the best: the axis is logarithmic and ends, and they stand at its end.

A method that breaks a model can be a thousand times worse than the others, which nobody could tell
apart beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from quest_dist.figures.style import Look

#: The metric that this is about, and how many times the best its axis goes.
METRIC, WORST = "perplexity", 4.0
TICKS = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
NOTE = f"Perplexities above {WORST:g} times the best stand at the axis's end, hollow."


def overflows(metric: str, scores: Sequence[float]) -> bool:
    """Whether some of a panel's scores are far beyond the best."""
    return metric == METRIC and bool(scores) and max(scores) > WORST * min(scores)


def logarithmic(axes: Axes, scores: Sequence[float]) -> float:
    """Make the scores' axis logarithmic; where it ends."""
    end = min(max(scores), WORST * min(scores))
    axes.set_yscale("log")
    axes.set_ylim(0.93 * min(scores), 1.06 * end)
    axes.yaxis.set_major_locator(LogLocator(subs=TICKS))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda score, _: f"{score:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    return end


def mark(
    axes: Axes,
    dots: Sequence[tuple[float, float]],
    end: float,
    look: Look,
    size: float,
    over: int,
) -> None:
    """Rings at the axis's end for those of a line's (x, score) that lie beyond it, and what they
    are."""
    there = [(x, score) for x, score in dots if score > end]
    if not there:
        return
    places, scores = zip(*there, strict=True)
    ring: dict[str, Any] = {"marker": look.marker or "s", "ms": size, "mfc": "white"}
    axes.plot(places, [end] * len(there), ls="", mec=look.color, zorder=over + 1, **ring)
    told = " to ".join(f"{score:,.0f}" for score in sorted({min(scores), max(scores)}))
    at: dict[str, Any] = {"xytext": (0, -6), "textcoords": "offset points"}
    small: dict[str, Any] = {"ha": "center", "va": "top", "fontsize": 6.5, "color": look.color}
    axes.annotate(told, (max(places), end), **at, **small)
