"""Bars of times relative to dense attention: ours filled, the paper's hatched and hollow beside."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

from quest_dist.figures import style
from quest_dist.figures.times import Value, whisker

WIDTH = 0.36
HATCH = "////"


def ours(axes: Axes, x: float, parts: Sequence[tuple[str, float, str]], whole: Value) -> None:
    """A stack of (name, height, colour) at x; the interval is that of the whole."""
    bottom = 0.0
    for name, height, color in parts:
        axes.bar(x, height, WIDTH, bottom=bottom, color=color, label=_once(axes, name), zorder=3)
        bottom += height
    whisker(axes, x, whole)


def papers(axes: Axes, x: float, parts: Sequence[float], label: str) -> None:
    """The paper's stack at x."""
    bottom = 0.0
    for height in parts:
        edge: dict[str, Any] = {"edgecolor": style.FAINT, "facecolor": "none", "lw": 0.8}
        axes.bar(
            x, height, WIDTH, bottom=bottom, hatch=HATCH, label=_once(axes, label), zorder=2, **edge
        )
        bottom += height


def said(axes: Axes, x: float, y: float, text: str, color: str = style.INK) -> None:
    """A few words above a bar."""
    if not math.isnan(y):
        axes.annotate(
            *(text, (x, y)),
            xytext=(0, 2),
            textcoords="offset points",
            ha="center",
            va="bottom",
            size=6.8,
            color=color,
        )


def inside(axes: Axes, x: float, text: str) -> None:
    """A few words up the foot of a bar."""
    how: dict[str, Any] = {"ha": "center", "va": "bottom", "rotation": 90, "zorder": 8}
    axes.text(x, 0.02, text, size=6.2, color="white", **how)


def ticks(axes: Axes, places: Sequence[float], names: Sequence[str]) -> None:
    """Names below groups of bars, and room above for words and legend."""
    axes.set_xticks(list(places), list(names))
    axes.set_ylim(0, 1.42)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0])


def _once(axes: Axes, name: str) -> str | None:
    return None if name in axes.get_legend_handles_labels()[1] else name
