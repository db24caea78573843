"""Figure 10 of the paper: a whole model's decode step, by context and budget.

(a) 16-bit weights and (b) 4-bit weights, each as a multiple of its own full step at the same
context. Where there are no rows of 4-bit weights, (b) is the paper's alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from quest_dist.figures import bars, style, times
from quest_dist.figures.caption import Caption
from quest_dist.figures.panels import Plotted
from quest_dist.figures.paper import Verdict
from quest_dist.figures.times import Group, Value, entries, fact, inverse
from quest_dist.table import Row

NAME = "fig10"
PARTS = ("fig10a", "fig10b")
TABLES = dict(zip(PARTS, ("fp16_ms", "awq_w4_ms"), strict=True))
HEADS = ("(a) 16-bit weights", "(b) 4-bit weights")
FOUR_BITS = "4 bits"
NOT_RUN = Verdict("not run", "no points with 4-bit weights")
CONTEXTS = (8192, 16384, 32768)
COLUMNS = ("full", "512", "1024", "2048", "4096")
HIGHEST = 1.2  # where words above a bar stand at most, whatever its interval
COLORS = (style.INK, *times.BLUES[:4])
NOTES = (
    "On ours: milliseconds a token and, on Quest's, the speed-up over full. Hatched: the paper,"
    " Figure 10 (printed), Llama-2-7B on an RTX 6000 Ada, in (b) with AWQ: attention's share of a"
    " step is not ours. Ours in (b): AWQ's format, groups of 128, random weights rounded to the"
    " nearest; embeddings and the output's weights as in (a).",
)


def takes(row: Row) -> bool:
    """Whether a row belongs in this figure."""
    return row.task.startswith("textgen_") and row.method in times.METHODS


def draw(rows: Sequence[Row], caption: Caption) -> tuple[Figure, Plotted]:
    """Two panels a device."""
    title = "Decode step of a whole model, relative to full attention"
    parts = PARTS if any(map(_of_four, rows)) else PARTS[:1]
    figure, plotted = times.page(NAME, title, rows, caption, HEADS, _draw, NOTES, parts)
    return figure, plotted if len(parts) > 1 else [*plotted, *_papers_own(plotted)]


def verdicts(rows: Sequence[Row]) -> dict[str, Verdict]:
    """Of both parts."""
    figure = style.canvas(3.0)
    plotted = [
        line
        for group in times.groups(rows)
        for line in _draw([figure.add_subplot() for _ in PARTS], group)
    ]
    found = {part: times.overall(NAME, _rows(rows, part), plotted, part) for part in PARTS}
    return found if _rows(rows, PARTS[1]) else {**found, PARTS[1]: NOT_RUN}


def _of_four(row: Row) -> bool:
    """Whether a row's weights had 4 bits; one that has not run goes by its task's name."""
    return row.notes("weights") == (FOUR_BITS,) or row.task.startswith("textgen_w4_")


def _rows(rows: Sequence[Row], part: str) -> tuple[Row, ...]:
    return tuple(row for row in rows if _of_four(row) == (part == PARTS[1]))


def _draw(panels: list[Axes], group: Group) -> Plotted:
    first, second = panels
    plotted = []
    for panel, part in zip(panels, PARTS, strict=True):
        plotted += _bars(panel, part, replace(group, rows=_rows(group.rows, part)))
    first.set_ylabel("time / full's at the same context")
    where: dict[str, Any] = {"ha": "right", "va": "top", "transform": second.transAxes}
    if not any(line["part"] == PARTS[1] for line in plotted):
        second.text(0.99, 0.99, f"{NOT_RUN}\nthe paper's alone", size=8, color=style.WARN, **where)
    how: dict[str, Any] = {"fontsize": 7, "handlelength": 1.4, "labelspacing": 0.3}
    how |= {"borderaxespad": 0.1, "ncols": 3, "columnspacing": 1.0}
    how |= {"loc": "upper right", "bbox_to_anchor": (1.0, 0.9)}  # below the words
    handles, labels = first.get_legend_handles_labels()
    second.legend(handles, labels, **how)
    return plotted


def _bars(axes: Axes, part: str, group: Group) -> Plotted:
    known: Any = times.setting(NAME)[TABLES[part]]
    plotted: Plotted = []
    places: list[float] = []
    names: list[str] = []
    step = 2 * bars.WIDTH + 0.12
    for i, context in enumerate(CONTEXTS):
        full, sparse = group.full(context), group.sparse(context)
        start = i * (len(COLUMNS) * step + 0.6)
        places.append(start + (len(COLUMNS) - 1) * step / 2)
        names.append(f"{style.tokens(context)} tokens")
        for j, (name, color) in enumerate(zip(COLUMNS, COLORS, strict=True)):
            x = start + j * step
            value = known[str(context)][name]
            theirs = value / known[str(context)]["full"]
            bars.papers(axes, x + bars.WIDTH / 2, [theirs], "paper (RTX 6000 Ada)")
            row = full if name == "full" else sparse.get(int(name))
            if row is None or full is None:
                continue
            ours: Value = (1.0, math.nan, math.nan)
            if row is not full:
                ours = inverse(fact(row, "speedup"))
            label = "full" if name == "full" else f"budget {style.tokens(int(name))}"
            bars.ours(axes, x - bars.WIDTH / 2, [(label, ours[0], color)], ours)
            at, high = x - bars.WIDTH / 2, ours[0] if math.isnan(ours[2]) else ours[2]
            bars.inside(axes, at, f"{row.score:.0f} ms")
            if row is not full:
                bars.said(axes, at, min(max(high, theirs), HIGHEST), f"{1 / ours[0]:.2f}x")
            time = (row.score, row.low, row.high)
            quantity = "step / full step"
            lines = entries(NAME, part, group, row, quantity, ours, time, theirs, value)
            bits = {"weights": FOUR_BITS if part == PARTS[1] else "16 bits"}
            plotted += [line | bits for line in lines]
    bars.ticks(axes, places, names)
    return plotted


def _papers_own(like: Plotted) -> Plotted:
    """CSV lines of the paper's 4-bit bars, where there are none of ours."""
    known = times.setting(NAME)["awq_w4_ms"]
    said = {"part": PARTS[1], "verdict": NOT_RUN.verdict, "reason": NOT_RUN.reason}
    blank = dict.fromkeys(like[0], math.nan) if like else {}
    return [
        blank
        | {"series": "paper", "quantity": "step / full step", "context": int(context), "unit": "ms"}
        | {"budget": None if name == "full" else int(name), "time": value, "page_size": 16}
        | {"value": value / columns["full"], "device": times.setting(NAME)["gpu"], **said}
        | {"model": times.setting(NAME)["model"], "dtype": "float16", "n": None}
        | {"status": "", "point": "", "weights": FOUR_BITS}
        for context, columns in (known.items() if like else ())
        for name, value in columns.items()
    ]
