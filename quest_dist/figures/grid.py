"""A page of budget panels with one legend: the layout that fig06, fig07 and curves share."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.figure import Figure

from quest_dist.figures import caption as captions
from quest_dist.figures import panels, paper, style
from quest_dist.figures.caption import Caption
from quest_dist.table import Panel, Row, pivot

PANEL = 2.25  # inches of height a row of panels takes
LEGEND = 0.34


def page(
    name: str, title: str, rows: Sequence[Row], caption: Caption, order: Sequence[str] = ()
) -> tuple[Figure, panels.Plotted]:
    """Draw one panel for each task and setting of the rows, three in a line."""
    places = {task: i for i, task in enumerate(order)}
    found = sorted(pivot(rows), key=lambda panel: places.get(panel.task, len(places)))
    across = len(found) if len(found) < 4 else 2 if len(found) == 4 else 3
    down = -(-len(found) // across)
    verdict = paper.overall(name, rows)
    sure = any(not math.isnan(row.low) for row in rows)
    bars = "Bars: 95 % intervals over samples" if sure else "One sample a point has no interval"
    notes = [bars]
    if name in paper.reference():
        notes.append(f"Against the paper: {verdict}.")
    handles = panels.legend(found)
    lines = len(captions.small_print(rows, caption, [*notes, captions.lacking(rows)]))
    tall = PANEL if down > 1 else 2.9
    legend_lines = -(-len(handles) // 7)
    fixed = captions.HEAD + LEGEND * legend_lines + 0.5 + lines * captions.LINE
    height = fixed + down * tall
    figure = style.canvas(height)
    bottom, top = captions.put(figure, title, rows, caption, notes)
    top -= LEGEND * legend_lines / height
    box = {"left": 0.065, "right": 0.985, "bottom": bottom + 0.42 / height}
    gap = 0.24 if across == 3 else 0.18
    spec = figure.add_gridspec(
        down, across, top=top - 0.24 / height, hspace=0.36, wspace=gap, **box
    )
    plotted: panels.Plotted = []
    for i, panel in enumerate(found):
        axes = figure.add_subplot(spec[i // across, i % across])
        plotted += panels.draw(axes, panel, name, _title(panel, found), 0.033 * across)
        if i + across < len(found):
            axes.set_xlabel("")
    if any(line["series"] == "paper" for line in plotted):
        handles.append(panels.paper_handle())
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.005, top + (LEGEND * legend_lines + 0.02) / height),
        ncols=-(-len(handles) // legend_lines),
        handlelength=2.4,
        columnspacing=1.5,
        handletextpad=0.6,
        borderaxespad=0.2,
    )
    return figure, plotted


def _title(panel: Panel, found: Sequence[Panel]) -> str:
    title = panel.title
    if len({other.model_label for other in found}) > 1:
        title += f" · {panel.model_label}"
    if len({other.data for other in found}) > 1:
        title += f" · {panel.data}"
    return title
