"""Figure 3 of the paper: the share of each layer's cache that can be left out, by layer.

One layer at a time is sparse. Its sparsity is 1 - budget / context for the smallest budget at
which, and at all larger ones measured, perplexity rises by less than a bound; 0 where none does.
The paper's bound takes very many tokens to resolve, so a wider one is drawn below it. The bar goes
from what the 95 % interval of the rise proves (its upper end below the bound) to what it does not
rule out (its lower end). The grid of budgets is the resolution, stated in the small print.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from quest_dist.details import Dot
from quest_dist.figures import caption as captions
from quest_dist.figures import panels, paper, style
from quest_dist.figures.caption import Caption
from quest_dist.figures.paper import Verdict
from quest_dist.table import Line, Panel, Row, pivot

NAME = "fig03"
#: How much perplexity may rise: as in the paper, and what fewer tokens can tell.
BOUND, WIDER = 0.01, 0.1
#: How far a layer's sparsity may lie from the paper's and still be called reproduced.
NEAR = 0.05
PANEL, LEGEND = 2.9, 0.36  # inches


@dataclass(frozen=True)
class Layer:
    """What one layer of one method can leave out. `row` is the point of the budget chosen, or of
    the largest one where none will do; `low` and `high` are NaN without an interval."""

    layer: int
    sparsity: float
    low: float
    high: float
    budget: int | None
    row: Row


def takes(row: Row) -> bool:
    """Whether a row belongs in this figure."""
    return row.metric == "nll_increase" or row.task == "sparsity"


def rise(row: Row, layer: int) -> tuple[float, float, float]:
    """How much perplexity rises with this layer sparse: (estimate, ends of its 95 % interval).

    Full's perplexity times expm1 of the mean increase in nats; NaN where it was not measured.
    """
    dot = next((dot for dot in row.curve_dots if dot.x == layer), Dot(layer, *(math.nan,) * 3, 0))
    full = math.exp(row.fact("dense_nll"))
    value, low, high = (full * math.expm1(x) for x in (dot.value, dot.low, dot.high))
    return value, low, high


def layers_of(by_budget: Mapping[int, Row], bound: float = BOUND) -> list[Layer]:
    """What each layer can leave out, by layer; `by_budget` are the rows of one line."""
    rows = [row for _, row in sorted(by_budget.items()) if row.n and row.curve_dots]
    found = []
    for layer in sorted({int(dot.x) for row in rows for dot in row.curve_dots}):
        rises = [rise(row, layer) for row in rows]
        chosen, sure, open_ = (_smallest([r[end] for r in rises], bound) for end in (0, 2, 1))
        known = all(not math.isnan(high) for _, _, high in rises)
        row = rows[-1] if chosen is None else rows[chosen]
        found.append(
            Layer(
                layer=layer,
                sparsity=_sparsity(rows, chosen),
                low=_sparsity(rows, sure) if known else math.nan,
                high=_sparsity(rows, open_) if known else math.nan,
                budget=None if chosen is None else row.budget,
                row=row,
            )
        )
    return found


def verdicts(rows: Sequence[Row]) -> dict[str, Verdict]:
    """The figure's verdict: the worst of its layers, where they may be compared."""
    each = [
        judge(layer, line.method)
        for panel in pivot(rows)
        for line in panel.lines
        for layer in layers_of(line.by_budget)
    ]
    if not each:
        return {NAME: Verdict("not run", rows[0].error or rows[0].status if rows else "no points")}
    compared = [verdict for verdict in each if verdict.paper is not None]
    if not compared:
        return {NAME: each[0]}
    counts = {word: sum(v.verdict == word for v in compared) for word in paper.ORDER[:3]}
    worst = next(word for word, count in counts.items() if count)
    said = ", ".join(f"{count} {word}" for word, count in counts.items())
    return {NAME: Verdict(worst, f"of {len(compared)} layers {said}")}


def judge(layer: Layer, method: str) -> Verdict:
    """One layer against the same layer of the paper's line."""
    (setting,) = paper.reference()[NAME]
    row = layer.row
    if setting["model"].lower() not in row.model_label.lower():
        why = f"other model ({row.model_label}; the paper: {setting['model']})"
        return Verdict("not comparable", why)
    if row.data == "generated":
        return Verdict("not comparable", "generated data")
    value = setting["values"]["sparsity"].get(method, {}).get(str(layer.layer))
    if value is None:
        return Verdict("not comparable", f"the paper has no layer {layer.layer} for {row.label}")
    if math.isnan(layer.low):
        return Verdict("not comparable", "one sample has no interval", value)
    said = f"ours {layer.sparsity:.2f} [{layer.low:.2f}, {layer.high:.2f}], the paper {value:g}"
    if not layer.low - NEAR <= value <= layer.high + NEAR:
        return Verdict("differs", said, value)
    near = abs(layer.sparsity - value) <= NEAR
    return Verdict("reproduced" if near else "within interval", said, value)


def draw(rows: Sequence[Row], caption: Caption) -> tuple[Figure, panels.Plotted]:
    """One panel a text and setting, one line a method."""
    found = pivot(rows)
    notes = _notes(rows)
    lines = len(captions.small_print(rows, caption, [*notes, captions.lacking(rows)]))
    places = [(panel, bound) for panel in found for bound in (BOUND, WIDER)]
    height = captions.HEAD + LEGEND + len(places) * PANEL + 0.5 + lines * captions.LINE
    figure = style.canvas(height)
    title = "How much of the cache each layer can leave out"
    bottom, top = captions.put(figure, title, rows, caption, notes)
    top -= LEGEND / height
    box = {"left": 0.065, "right": 0.985, "bottom": bottom + 0.42 / height}
    spec = figure.add_gridspec(len(places), 1, top=top - 0.3 / height, hspace=0.36, **box)
    plotted: panels.Plotted = []
    for place, (panel, bound) in enumerate(places):
        axes = figure.add_subplot(spec[place])
        plotted += _panel(axes, panel, bound, len(found) > 1)
        if place + 1 == len(places):
            axes.set_xlabel("layer")
    handles = panels.legend(found)
    if any(line["series"] == "paper" for line in plotted):
        handles.append(panels.paper_handle())
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.005, top + (LEGEND + 0.02) / height),
        ncols=len(handles),
        handlelength=2.4,
        columnspacing=1.5,
    )
    return figure, plotted


def _smallest(rises: Sequence[float], bound: float) -> int | None:
    """Place of the smallest budget that keeps the bound, as all larger ones do."""
    found = None
    for place in reversed(range(len(rises))):
        if not rises[place] < bound:
            break
        found = place
    return found


def _sparsity(rows: Sequence[Row], chosen: int | None) -> float:
    if chosen is None:
        return 0.0
    row = rows[chosen]
    return max(0.0, 1 - (row.budget or 0) / row.context_tokens)


def _notes(rows: Sequence[Row]) -> list[str]:
    budgets = sorted({row.budget for row in rows if row.budget})
    context = max((row.context_tokens for row in rows if row.n), default=math.nan)
    full = [math.exp(row.fact("dense_nll")) for row in rows if row.n]
    resolution = "Budgets measured, which are the resolution: " + " ".join(map(str, budgets))
    if full:
        resolution += f" of {context:.0f} tokens; full's perplexity there {min(full):.2f}"
    return [
        "Bars: from the sparsity that the 95 % interval of the rise proves to that which it allows",
        "One layer at a time is sparse, all others dense; a layer in which no budget keeps the "
        f"bound, at it and at all larger ones, is at 0. {resolution}.",
        "The paper (LongChat-7B, 32 layers): 0.03 and 0.02 in layers 0 and 1; its caption says "
        "more than 0.9 in the others, where its lines go down to 0.88 (oracle) and 0.61 (Quest).",
        f"Against the paper: {verdicts(rows)[NAME]}.",
    ]


def resolved(panel: Panel, bound: float) -> str:
    """How many layers have a bar, and so another answer with other samples; nothing if none."""
    every = [layer for line in panel.lines for layer in layers_of(line.by_budget, bound)]
    barred = sum(layer.low != layer.high for layer in every)
    return f"{barred} of {len(every)} not resolved" if barred else ""


def _panel(axes: Axes, panel: Panel, bound: float, named: bool) -> panels.Plotted:
    plotted: panels.Plotted = []
    said = [f"{panel.title} · {panel.model_label}"] if named else []
    said.append(f"perplexity may rise by {bound:g}" + (", as in the paper" * (bound == BOUND)))
    axes.set_title(" · ".join(said), loc="left", weight="bold", pad=6)
    small: dict[str, Any] = {"loc": "right", "color": style.FAINT, "size": 8}
    axes.set_title(resolved(panel, bound), **small)
    axes.set_ylabel("share left out")
    axes.set_ylim(-0.03, 1.03)
    lines = sorted(panel.lines, key=lambda line: style.look(line.method).strong)
    last = 0
    for place, line in enumerate(lines):
        found = layers_of(line.by_budget, bound)
        moved = 0.0 if len(lines) < 2 else 0.16 * (2 * place / (len(lines) - 1) - 1)
        plotted += _line(axes, line, found, bound, moved)
        last = max([last, *(each.layer for each in found)])
    axes.set_xlim(-0.7, last + 0.7)
    axes.set_xticks(range(0, last + 1, 1 if last < 12 else 2))
    if not plotted:
        where: dict[str, Any] = {"transform": axes.transAxes, "ha": "center", "va": "center"}
        axes.text(0.5, 0.5, "no results yet", color=style.FAINT, **where)
    return plotted


def _line(
    axes: Axes, line: Line, found: Sequence[Layer], bound: float, moved: float
) -> panels.Plotted:
    seen = style.look(line.method)
    width, size, over = (2.0, 5.2, 5) if seen.strong else (1.3, 4.6, 3)
    x = [each.layer + moved for each in found]
    look: dict[str, Any] = {"color": seen.color, "marker": seen.marker, "ms": size, "mew": 0}
    axes.plot(x, [each.sparsity for each in found], lw=width, zorder=over, **look)
    bars = [each for each in found if not math.isnan(each.low)]
    axes.vlines(
        [each.layer + moved for each in bars],
        [each.low for each in bars],
        [each.high for each in bars],
        color=seen.color,
        lw=1.1,
        alpha=0.3,
        zorder=over - 2,
    )
    plotted = []
    for each in found:
        verdict = judge(each, line.method)
        if bound != BOUND:
            verdict = Verdict("not comparable", f"the paper's bound is {BOUND:g}")
        plotted.append(_entry(line, each, bound, verdict))
        if verdict.paper is not None:
            mark: dict[str, Any] = {"mec": seen.color, "mfc": "none", "mew": 1.2, "zorder": 8}
            axes.plot([each.layer + moved], [verdict.paper], seen.marker, ms=size + 2, **mark)
            blank = {"low": math.nan, "high": math.nan, "budget": None, "n": None}
            blank |= dict.fromkeys(("rise", "rise_low", "rise_high"), math.nan)
            ours = _entry(line, each, bound, verdict)
            plotted.append({**ours, "series": "paper", "sparsity": verdict.paper, **blank})
    return plotted


def _entry(line: Line, each: Layer, bound: float, verdict: Verdict) -> dict[str, Any]:
    row = each.row
    value, low, high = rise(row, each.layer)
    return {
        "series": "measured",
        "bound": bound,
        "task": row.task,
        "model": row.model,
        "data": row.data,
        "method": row.method,
        "label": line.label,
        "layer": each.layer,
        "sparsity": each.sparsity,
        "low": each.low,
        "high": each.high,
        "budget": each.budget,
        "rise": value,
        "rise_low": low,
        "rise_high": high,
        "full_perplexity": math.exp(row.fact("dense_nll")),
        "context_tokens": row.context_tokens,
        "n": row.n,
        "n_expected": row.n_expected,
        "status": row.status,
        "verdict": verdict.verdict,
        "reason": verdict.reason,
        "point": row.point,
    }
