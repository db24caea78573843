"""Table 1 of the paper: passkey retrieval accuracy by method and token budget, as a picture.

Each cell is coloured by its accuracy and says its 95 % interval; where the paper's value may be
compared it stands in the cell's corner.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from quest_dist.figures import caption as captions
from quest_dist.figures import panels, paper, style
from quest_dist.figures.caption import Caption
from quest_dist.table import Line, Panel, Row, pivot

NAME = "table1"
CELL = 0.44  # inches a line of the table takes
GAP = 0.55  # inches above a table, for its heads
SHADES = LinearSegmentedColormap.from_list("accuracy", ["#f7f7f5", "#bcd7e8", "#3d8fc4", "#0a5c91"])


def takes(row: Row) -> bool:
    """Whether a row belongs in this figure."""
    return row.metric == "accuracy" or row.task.startswith("passkey")


def draw(rows: Sequence[Row], caption: Caption) -> tuple[Figure, panels.Plotted]:
    """One table a task and setting, below each other."""
    found = pivot(rows)
    notes = ["Small figures: 95 % intervals over samples"]
    notes.append(f"Against the paper: {paper.overall(NAME, rows)}.")
    lines = len(captions.small_print(rows, caption, [*notes, captions.lacking(rows)]))
    heights = [len(panel.lines) * CELL for panel in found]
    height = captions.HEAD + sum(heights) + GAP * len(found) + 0.3 + lines * captions.LINE
    figure = style.canvas(height)
    captions.put(figure, "Passkey retrieval: accuracy by token budget", rows, caption, notes)
    plotted: panels.Plotted = []
    top = height - captions.HEAD - GAP + 0.12
    for panel, tall in zip(found, heights, strict=True):
        axes = figure.add_axes((0.175, (top - tall) / height, 0.81, tall / height))
        plotted += _table(axes, panel, len(found) > 1)
        top -= tall + GAP
    return figure, plotted


def _table(axes: Axes, panel: Panel, named: bool) -> panels.Plotted:
    lines = sorted(panel.lines, key=_rank)
    columns: list[int | None] = list(panel.budgets) or [None]
    axes.set_xlim(0, len(columns))
    axes.set_ylim(len(lines), 0)
    axes.grid(False)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(length=0)
    axes.xaxis.tick_top()
    heads = [style.tokens(b) if b else "" for b in columns]
    axes.set_xticks([i + 0.5 for i in range(len(columns))], heads, color=style.INK)
    axes.set_yticks([i + 0.5 for i in range(len(lines))], [line.label for line in lines])
    for text, line in zip(axes.get_yticklabels(), lines, strict=True):
        strong = style.look(line.method).strong
        text.set(color=style.look(line.method).color if strong else style.INK, size=9.5)
        text.set_fontweight("bold" if strong else "normal")
    where: dict[str, Any] = {"va": "bottom", "size": 8.5, "color": style.FAINT}
    axes.text(-0.05, -0.12, "token budget", ha="right", **where)
    if named:
        said = f"{panel.title} · {panel.model_label}{_context(panel)}"
        axes.text(0, -0.62, said, weight="bold", size=10)
    plotted: panels.Plotted = []
    for y, line in enumerate(lines):
        # Full has no budget: one cell as wide as the table.
        wide = len(columns) if not line.by_budget else 1
        for x, budget in enumerate(columns if line.by_budget else [None]):
            row = line.flat if budget is None else line.by_budget.get(budget)
            _cell(axes, x, y, row, wide)
            if row is not None and row.n:
                plotted.append(panels.entry(NAME, row, line.label))
                value = paper.judge(NAME, row).paper
                if value is not None:
                    plotted.append(panels.paper_entry(NAME, row, line.label, value))
    return plotted


def _context(panel: Panel) -> str:
    """How long the prompts are, where anything was run."""
    lengths = [row.context_tokens for line in panel.lines for row in line.rows() if row.n]
    return f" · {max(lengths):.0f} tokens" if lengths else ""


def _cell(axes: Axes, x: int, y: int, row: Row | None, wide: int) -> None:
    known = row is not None and row.n > 0
    shade = SHADES(row.score / 100) if row is not None and known else "#ffffff"
    line = "white" if known else style.GRID
    edge: dict[str, Any] = {"edgecolor": line, "lw": 2.0 if known else 0.8}
    axes.add_patch(Rectangle((x + 0.01, y + 0.03), wide - 0.02, 0.94, facecolor=shade, **edge))
    middle: dict[str, Any] = {"ha": "center", "va": "center"}
    if row is None or not known:
        word = "failed" if row is not None and row.status == "failed" else "not run"
        color = style.WARN if word == "failed" else "#b0b0b0"
        axes.text(x + wide / 2, y + 0.5, word, size=8, color=color, **middle)
        return
    ink = "white" if row.score > 60 else style.INK
    sure = not math.isnan(row.low)
    value = f"{row.score:.0f}" + ("" if row.status == "finished" else f" (n={row.n})")
    axes.text(x + wide / 2, y + (0.38 if sure else 0.5), value, size=11, color=ink, **middle)
    if sure:
        span = f"{row.low:.0f} to {row.high:.0f}"
        axes.text(x + wide / 2, y + 0.75, span, size=7, color=ink, alpha=0.8, **middle)
    value_of_paper = paper.judge(NAME, row).paper
    if value_of_paper is not None:
        said = f"paper {value_of_paper:g}"
        axes.text(x + wide - 0.05, y + 0.2, said, size=6.5, color=ink, ha="right", va="center")


def _rank(line: Line) -> int:
    if not line.by_budget:
        return 0
    return {"quest": 2, "tightbound": 3}.get(line.method, 1)
