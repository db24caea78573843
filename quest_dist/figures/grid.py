"""A page of budget panels with one legend: the layout that fig06, fig07 and curves share."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.figure import Figure

from quest_dist.figures import beyond, panels, paper, style
from quest_dist.figures import caption as captions
from quest_dist.figures.caption import Caption
from quest_dist.table import Panel, Row, pivot

PANEL = 2.25  # inches of height a row of panels takes
LEGEND, NEXT = 0.34, 0.19  # inches of the legend: its first line, each further one


def page(
    name: str,
    title: str,
    rows: Sequence[Row],
    caption: Caption,
    order: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> tuple[Figure, panels.Plotted]:
    """Draw one panel for each task and setting of the rows, three in a line; `notes` join the small
    print."""
    places = {task: i for i, task in enumerate(order)}
    found = sorted(pivot(rows), key=lambda panel: places.get(panel.task, len(places)))
    across = len(found) if len(found) < 4 else 2 if len(found) == 4 else 3
    down = -(-len(found) // across)
    verdict = paper.overall(name, rows)
    notes = [_bars(rows), *notes]
    if name in paper.reference():
        notes.append(f"Against the paper: {verdict}.")
    if any(beyond.overflows(panel.metric, panels.scores_of(panel)) for panel in found):
        notes.append(beyond.NOTE)
    handles = panels.legend(found)
    if any(paper.judge(name, row).paper is not None for row in rows):
        handles.append(panels.paper_handle())
    lines = len(captions.small_print(rows, caption, [*notes, captions.lacking(rows)]))
    tall = PANEL if down > 1 else 2.9
    columns = _columns([str(handle.get_label()) for handle in handles])
    legend_lines = -(-len(handles) // columns)
    legend = LEGEND + NEXT * (legend_lines - 1)
    fixed = captions.HEAD + legend + 0.5 + lines * captions.LINE
    height = fixed + down * tall
    figure = style.canvas(height)
    bottom, top = captions.put(figure, title, rows, caption, notes)
    top -= legend / height
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
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.005, top + (legend + 0.02) / height),
        ncols=-(-len(handles) // legend_lines),
        handlelength=2.4,
        columnspacing=1.5,
        handletextpad=0.6,
        borderaxespad=0.2,
    )
    return figure, plotted


def _bars(rows: Sequence[Row]) -> str:
    if all(math.isnan(row.low) for row in rows):
        return "One sample a point has no interval"
    if all(panels.paired(row) for row in rows if row.n):
        return "Bars: 95 % intervals of the difference from full on the same samples"
    return "Bars: 95 % intervals over samples"


def _columns(labels: Sequence[str]) -> int:
    """How many legend entries go on a line, by the width of their text."""
    widths = [0.62 + 0.073 * len(label) for label in labels]
    if sum(widths) < style.WIDTH:
        return len(labels)
    return max(1, int(style.WIDTH / max(widths)))


def _title(panel: Panel, found: Sequence[Panel]) -> str:
    title = panel.title
    if len({other.model_label for other in found}) > 1:
        title += f" · {panel.model_label}"
    if len({other.data for other in found}) > 1:
        title += f" · {panel.data}"
    return title
