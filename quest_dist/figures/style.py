"""How every figure looks: colours, marks, type, and how it is written to disk.

Invariants: a method has one colour and one mark in every figure; Quest and our own stand out,
baselines recede; colours differ in lightness as well as hue, and marks differ too, so that a
figure reads in grey and for the colour-blind. Bitmaps are 200 dpi, 1800 pixels wide, to be shown
at half that; PDFs carry their fonts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

WIDTH = 9.0  # inches: 900 px in a README at 100 px an inch
INK, FAINT, GRID, WARN = "#222222", "#6b6b6b", "#e6e6e6", "#a3470b"
DPI = 200


@dataclass(frozen=True)
class Look:
    """Colour, mark and weight of a method's line."""

    color: str
    marker: str
    strong: bool = False


# Okabe & Ito's blue and vermillion for the two that matter, muted tints for what they are
# compared with, violets for the oracles.
LOOKS = {
    "full": Look("#222222", ""),
    "quest": Look("#0072B2", "o", strong=True),
    "tightbound": Look("#D55E00", "D", strong=True),
    "streaming": Look("#b5b5b5", "v"),
    "h2o": Look("#6fa08b", "s"),
    "tova": Look("#c7a252", "^"),
    "oracle_page": Look("#6a51a3", "p"),
    "oracle_token": Look("#b3a2d0", "h"),
    "snapkv": Look("#8c6d62", "<"),
    "pyramidkv": Look("#b89a8e", "8"),
    "dejavu": Look("#708238", "H"),
    "qhitter": Look("#4f7f9b", ">"),
    "kivi4": Look("#a05a7c", "X"),
    "kivi2": Look("#d3a3ba", "X"),
    "quest_kivi4": Look("#4aa3d8", "o"),
    "kvquant4": Look("#7d5fb2", "P"),
    "kvquant3": Look("#a48fd0", "P"),
    "kvquant2": Look("#cbbfe6", "P"),
    "squeezed": Look("#7d8a3c", "d"),
    "less_h2o": Look("#54707d", "*"),
    "less_window": Look("#9fb4bd", "*"),
}
SPARE = (Look("#937860", "8"), Look("#5f9ea0", "H"), Look("#9e9ac8", "d"), Look("#a1887f", "X"))
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (4, 1.2, 1, 1.2)))

RC: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "axes.edgecolor": "#9a9a9a",
    "axes.linewidth": 0.7,
    "axes.labelcolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.solid_capstyle": "round",
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    "savefig.dpi": DPI,
}


def look(method: str) -> Look:
    """The look of a method; an unknown one gets a spare look, always the same for its name."""
    return LOOKS.get(method) or SPARE[sum(map(ord, method)) % len(SPARE)]


@contextmanager
def styled() -> Iterator[None]:
    """Our settings while a figure is drawn and saved; the user's own are left alone."""
    with mpl.rc_context(RC):
        yield


def canvas(height: float, width: float = WIDTH) -> Figure:
    """An empty figure without pyplot's global state, sizes in inches."""
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def tokens(count: float) -> str:
    """Budgets as axis labels: 512, 1K, 1.5K, 32K."""
    if count < 1024:
        return f"{count:g}"
    return f"{count / 1024:.3g}K"


def budget_axis(axes: Axes, budgets: list[int]) -> None:
    """A log2 axis whose ticks are the budgets that were run."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(budgets, [tokens(budget) for budget in budgets])
    axes.minorticks_off()
    ratio = 1.25 if len(budgets) < 4 else 1.18
    axes.set_xlim(budgets[0] / ratio, budgets[-1] * ratio)
    axes.set_xlabel("token budget")


def save(figure: Figure, directory: Path, name: str) -> list[Path]:
    """Write <name>.png and <name>.pdf; the same figure gives the same bytes."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"{name}.png", directory / f"{name}.pdf"]
    plain: dict[str, Any] = {"Software": None}
    figure.savefig(paths[0], dpi=DPI, metadata=plain)
    figure.savefig(paths[1], metadata={"CreationDate": None, "Producer": None, "Creator": None})
    return paths
