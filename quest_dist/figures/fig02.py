"""Figure 2 of the paper: whether a token is critical depends on the query that asks.

The paper prints no numbers, so none are compared. Its claim is, that the answer is critical to the
last query and was to none before. It counts as reproduced where the last query's attention to the
answer, over all texts, exceeds TIMES the mean of the queries before it, the largest of them, and
what it pays to the other answer: the low end of its interval, or the claim is within interval only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from quest_dist import details
from quest_dist.figures import caption as captions
from quest_dist.figures import panels, style
from quest_dist.figures.caption import Caption
from quest_dist.figures.paper import Verdict
from quest_dist.table import Row

NAME = "fig02"
TIMES = 4.0
#: Inches of a map with its labels; a row of the table takes one.
TALL = 3.25
SHADES = LinearSegmentedColormap.from_list(
    "attention", ["#fbfbfa", "#bcd7e8", "#3d8fc4", "#0a3c66"]
)
STANDS = "the paper prints no values; its claim"


def takes(row: Row) -> bool:
    """Whether a row belongs in this figure."""
    return row.metric == "attention" or row.task.startswith("attention_map")


def draw(rows: Sequence[Row], caption: Caption) -> tuple[Figure, panels.Plotted]:
    """For each row the first text's map, and beside it the answer's attention over all texts."""
    known = [row for row in rows if row.n] or list(rows[:1])
    notes = [
        "Bars: 95 % intervals over texts with other letters",
        f"Map: the first text. The head is chosen on a second text of the same pattern:"
        f" {', '.join(dict.fromkeys(_heads(row) for row in known))}.",
        *(f"{row.model_label}, {verdict(row)}." for row in known),
    ]
    lines = len(captions.small_print(rows, caption, [*notes, captions.lacking(rows)]))
    height = captions.HEAD + TALL * len(known) + 0.1 + lines * captions.LINE
    figure = style.canvas(height)
    captions.put(figure, "What is critical depends on the query", rows, caption, notes)
    plotted: panels.Plotted = []
    for place, row in enumerate(known):
        bottom = height - captions.HEAD - TALL * (place + 1) + 0.5
        tall = (TALL - 0.8) / height
        left = figure.add_axes((0.075, bottom / height, 0.385, tall))
        right = figure.add_axes((0.565, bottom / height, 0.42, tall))
        plotted += _row(left, right, row)
    return figure, plotted


def verdicts(rows: Sequence[Row]) -> dict[str, Verdict]:
    """How the figure stands to the paper's claim: the worst of its rows."""
    each = [verdict(row) for row in rows] or [Verdict("not run", "no points")]
    ranked = ("differs", "not run", "not comparable", "within interval", "reproduced")
    return {NAME: min(each, key=lambda one: ranked.index(one.verdict))}


def verdict(row: Row) -> Verdict:
    """Whether the paper's claim holds in a row."""
    if not row.n:
        return Verdict("not run", row.error or row.status)
    before, largest, other = (
        row.fact(name) for name in ("critical_before", "critical_largest", "other_last")
    )
    if math.isnan(row.low) or math.isnan(before + largest + other):
        return Verdict("not comparable", "the paper prints no values, and one text has no interval")
    least = max(TIMES * before, largest, other)
    said = (
        f"{STANDS} asks for more than {TIMES:g} times the mean of earlier queries ({before:.1f} %),"
        f" the largest of them ({largest:.1f} %) and the other answer's {other:.1f} %; the last"
        f" query pays {row.score:.1f} % [{row.low:.1f}, {row.high:.1f}]"
    )
    if row.low > least:
        return Verdict("reproduced", said)
    return Verdict("within interval" if row.high > least else "differs", said)


def _row(left: Axes, right: Axes, row: Row) -> panels.Plotted:
    judged = verdict(row)
    said: dict[str, Any] = {"verdict": judged.verdict, "reason": judged.reason}
    blank: dict[str, Any] = {"query": None, "key": None, "query_token": "", "key_token": ""}
    plotted = [panels.entry(NAME, row, row.label, **said, **blank)] if row.n else []
    drawing = details.read(row.details).get("drawing")
    if not drawing or not row.n:
        for axes in (left, right):
            axes.set_axis_off()
        middle: dict[str, Any] = {"transform": left.transAxes, "ha": "center", "va": "center"}
        left.text(0.5, 0.5, "no map yet", color=style.FAINT, **middle)
        return plotted
    tokens, matrix = drawing["tokens"], drawing["matrix"]
    _map(left, drawing, row)
    _by_query(right, drawing, row)

    def line(series: str, query: int, key: int, value: float, **more: Any) -> dict[str, Any]:
        place = {"query": query, "key": key, "query_token": tokens[query], "key_token": tokens[key]}
        unknown = {"low": math.nan, "high": math.nan, "n": 1, "point": ""}
        entry = panels.entry(NAME, row, row.label, series=series, score=value)
        return entry | said | place | unknown | more

    for query, paid in enumerate(matrix):
        plotted += [line("map", query, key, paid[key]) for key in range(query + 1)]
    for dot in row.curve_dots:
        bar = {"low": dot.low, "high": dot.high, "n": dot.n}
        plotted.append(line("mean", int(dot.x), drawing["critical"], dot.value, **bar))
    return plotted


def _map(axes: Axes, drawing: dict[str, Any], row: Row) -> None:
    tokens, matrix = drawing["tokens"], drawing["matrix"]
    axes.imshow(matrix, cmap=SHADES, vmin=0, vmax=100, aspect="auto")
    axes.grid(False)
    places = range(len(tokens))
    axes.set_xticks(places, tokens)
    axes.set_yticks(places, tokens)
    axes.set_ylabel("query")
    axes.set_xlabel("attends to")
    where = f"layer {drawing['layer']}, head {drawing['head']}"
    axes.set_title(f"{row.model_label}, {where}: attention, %", loc="left", weight="bold", size=9)
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        for name in ("critical", "other"):
            labels[drawing[name]].set(color=_color(name), fontweight="bold")
    for query, paid in enumerate(matrix):
        for key in range(query + 1):
            ink = "white" if paid[key] > 55 else style.INK
            middle: dict[str, Any] = {"ha": "center", "va": "center", "size": 6.5}
            axes.text(key, query, f"{paid[key]:.0f}", color=ink, **middle)


def _by_query(axes: Axes, drawing: dict[str, Any], row: Row) -> None:
    tokens = drawing["tokens"]
    dots = row.curve_dots
    x, color = [dot.x for dot in dots], _color("critical")
    axes.bar(x, [dot.value for dot in dots], color=color, alpha=0.85, width=0.62, zorder=3)
    axes.vlines(x, [d.low for d in dots], [d.high for d in dots], color=style.INK, lw=1.2, zorder=4)
    before = row.fact("critical_before")
    level: dict[str, Any] = {"color": style.FAINT, "lw": 1.1, "ls": (0, (4, 2))}
    axes.axhline(before, zorder=2, **level)
    axes.annotate(f"mean before the last: {before:.1f}", (x[0] - 0.4, before), (0, 3),
                  textcoords="offset points", size=7.5, color=style.FAINT)  # fmt: skip
    axes.set_xticks(x, [tokens[int(place)] for place in x])
    axes.set_xlabel("query")
    axes.set_ylim(0, None)
    answer, texts = tokens[drawing["critical"]], "1 text" if row.n == 1 else f"{row.n} texts"
    title = f"Attention to the answer (here \u201c{answer}\u201d), %, over {texts}"
    axes.set_title(title, loc="left", weight="bold", size=9)


def _color(name: str) -> str:
    return style.look("tightbound" if name == "critical" else "quest").color


def _heads(row: Row) -> str:
    return "; ".join(details.notes(row.details, "head")) or "none yet"
