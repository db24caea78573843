"""Figure 11 of the paper: the smallest lossless budget of each task and method, and what attention
takes at it.

A bar ends at the smallest budget that is surely lossless; its line reaches down to the largest that
is surely lossy, so a long line is a wide bracket. Where no budget is surely lossless there is no
bar, only the hatched bracket, up to the whole context.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from quest_dist import lossless
from quest_dist.figures import caption as captions
from quest_dist.figures import latency_at, paper, style
from quest_dist.figures.caption import Caption
from quest_dist.figures.fig07 import TASKS
from quest_dist.figures.panels import Plotted
from quest_dist.figures.paper import Verdict
from quest_dist.lossless import Lossless
from quest_dist.table import Row

NAME = "fig11"
PANEL = 2.35  # inches of height a panel takes
ORDER = ("full", "tova", "h2o", "streaming", "quest", "tightbound")
UNTIMED = "latency: not measured in this sweep"
CONTRADICTIONS = (
    "The paper states no delta. At the budgets that it calls lossless its own Figure 7 has TriviaQA"
    " 2.55, MultifieldQA 0.58 and GovReport 0.32 points below full; NarrativeQA's 5120 is beyond"
    " Figure 7, and the released script times 256 512 1024 512 4096 512 where Figure 11 prints"
    " 512 1024 1024 512 5120 1024."
)


def takes(row: Row) -> bool:
    """Whether a row belongs in this figure: it was searched, or is a time of attention."""
    return bool(lossless.part(row)) or row.metric == latency_at.METRIC


def verdicts(rows: Sequence[Row]) -> dict[str, Verdict]:
    """fig11a: the budgets; fig11b: the latency at them."""
    budgets = [judge(find, _row(rows, find)) for find in lossless.found(rows)]
    latency = Verdict("not run", UNTIMED)
    if any(row.metric == latency_at.METRIC and row.n for row in rows):
        latency = Verdict("not comparable", "other hardware (the paper: RTX 4090)")
    return {"fig11a": paper.worst(budgets), "fig11b": latency}


def judge(find: Lossless, row: Row) -> Verdict:
    """How a finding stands to the paper's budget: its bracket must hold it."""
    resolved = find.budget is not None and not find.undecided
    most = math.inf if find.budget is None else float(find.budget)
    return paper.bracket(NAME, row, find.lossy or 0, most, resolved, find.delta)


def draw(rows: Sequence[Row], caption: Caption) -> tuple[Figure, Plotted]:
    """Two panels, tokens above latency; tasks in the paper's order, a bar a method."""
    found = sorted(lossless.found(rows), key=lambda f: (_place(TASKS, f.task), f.model))
    tasks = list(dict.fromkeys((f.model, f.task) for f in found))
    methods = sorted({f.method for f in found} | {"full"}, key=lambda m: (_place(ORDER, m), m))
    timed = [row for row in rows if row.metric == latency_at.METRIC and row.n]
    searched = [row for row in rows if lossless.part(row)]
    notes = _notes(rows, found, bool(timed))
    lines = len(captions.small_print(searched or rows, caption, [*notes, captions.lacking(rows)]))
    panels = 2 if timed and found else 1
    height = captions.HEAD + 0.75 + panels * (PANEL + 0.3) + lines * captions.LINE
    figure = style.canvas(height)
    title = "Smallest lossless budget" + (", and the attention latency at it" if timed else "")
    bottom, top = captions.put(figure, title, searched or rows, caption, notes)
    top -= 0.34 / height
    box: dict[str, Any] = {"left": 0.075, "right": 0.985, "hspace": 0.3}
    spec = figure.add_gridspec(
        panels, 1, bottom=bottom + 0.32 / height, top=top - 0.24 / height, **box
    )
    axes = [figure.add_subplot(spec[i, 0]) for i in range(panels)]
    plotted: Plotted = []
    for x, place in enumerate(tasks):
        here = {f.method: f for f in found if (f.model, f.task) == place}
        plotted += _group(axes, x, methods, here, rows, timed)
    _ticks(axes, tasks, found, rows)
    labels = {row.method: row.label for row in searched}
    handles = [Patch(color=style.look(m).color, label=labels.get(m, m)) for m in methods]
    handles.append(
        Patch(facecolor="white", edgecolor=style.FAINT, hatch="////", label="unresolved")
    )
    if any(line["series"] == "paper" for line in plotted):
        handles.append(Patch(facecolor="none", edgecolor=style.INK, label="paper (hollow)"))
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.005, top + 0.36 / height),
        ncols=len(handles),
        handlelength=1.3,
        columnspacing=1.4,
        borderaxespad=0.2,
    )
    return figure, plotted


def _group(
    axes: Sequence[Axes],
    x: int,
    methods: Sequence[str],
    here: dict[str, Lossless],
    rows: Sequence[Row],
    timed: Sequence[Row],
) -> Plotted:
    """The bars of one task in every panel."""
    width = 0.8 / len(methods)
    any_find = next(iter(here.values()))
    like = _row(rows, any_find)
    context = _context(rows, like)
    plotted: Plotted = []
    for i, method in enumerate(methods):
        at = x - 0.4 + (i + 0.5) * width
        find = here.get(method)
        if find is None and method != "full":
            continue
        row = like if find is None else _row(rows, find)
        verdict = Verdict("", "") if find is None else judge(find, row)
        setting, _ = paper.beside(NAME, row)
        line = _entry(row, method, find, context) | {
            "verdict": verdict.verdict,
            "reason": verdict.reason,
        }
        plotted.append(line)
        _bar(axes[0], at, width, method, line)
        budget = None if find is None else find.budget
        latency = None
        if find is None or budget is not None:
            latency = latency_at.at(timed, row, method, budget, context)
        if len(axes) > 1:
            reason = "" if latency else _untimed(find, method)
            plotted.append(_timed_entry(line, latency, reason))
            _latency_bar(axes[1], at, width, method, latency)
        for panel, name in zip(axes, ("values", "attention_us"), strict=False):
            value = (setting or {}).get(name, {}).get(row.task, {}).get(method)
            if value is not None:
                panel.bar([at], [value], width * 0.96, fill=False, ec=style.INK, lw=1.0, zorder=6)
                part = "tokens" if name == "values" else "attention_us"
                plotted.append(line | {"series": "paper", "part": part, "value": float(value)})
    return plotted


def _bar(axes: Axes, at: float, width: float, method: str, line: dict[str, Any]) -> None:
    color = style.look(method).color
    size = width * 0.88
    low, high = line["lossy"] or 0, line["context_tokens"]
    if not math.isnan(line["value"]):
        axes.bar([at], [line["value"]], size, color=color, alpha=0.92, lw=0, zorder=3)
        if method != "full" and line["undecided"]:
            axes.vlines([at], max(low, 1), line["value"], color=style.INK, lw=1.4, zorder=5)
        text = "" if method == "full" else style.tokens(line["value"])
        top = line["value"]
    else:
        where: dict[str, Any] = {"bottom": max(low, 1), "zorder": 2, "lw": 0.8, "hatch": "////"}
        axes.bar([at], [high - max(low, 1)], size, fill=False, ec=color, alpha=0.75, **where)
        text, top = "?", high
    axes.annotate(
        text, (at, top), (0, 1.5), textcoords="offset points", ha="center", size=7, color=style.INK
    )


def _latency_bar(
    axes: Axes, at: float, width: float, method: str, latency: latency_at.Latency | None
) -> None:
    if latency is None:
        axes.annotate("-", (at, 0), (0, 1), textcoords="offset points", ha="center", size=8)
        return
    color = style.look(method).color
    axes.bar([at], [latency.value], width * 0.88, color=color, alpha=0.92, lw=0, zorder=3)
    axes.vlines([at], latency.low, latency.high, color=style.INK, lw=1.2, zorder=5)


def _entry(row: Row, method: str, find: Lossless | None, context: float) -> dict[str, Any]:
    """A CSV line; full's value is its context, a method's the smallest lossless budget."""
    value = context if find is None else float(find.budget or math.nan)
    return {
        "series": "measured",
        "part": "tokens",
        "task": row.task,
        "model": row.model,
        "data": row.data,
        "method": method,
        "label": row.label if find else "Full",
        "value": value,
        "lossy": find.lossy if find else None,
        "undecided": find.undecided if find else "",
        "at": find.at if find else None,
        "difference": find.difference if find else math.nan,
        "low": find.low if find else math.nan,
        "high": find.high if find else math.nan,
        "pairs": find.pairs if find else None,
        "delta": find.delta if find else math.nan,
        "confidence": find.confidence if find else math.nan,
        "context_tokens": context,
        "verdict": "",
        "reason": "",
    }


def _timed_entry(
    line: dict[str, Any], latency: latency_at.Latency | None, reason: str
) -> dict[str, Any]:
    found = (math.nan,) * 3 if latency is None else (latency.value, latency.low, latency.high)
    return line | {
        "part": "attention_us",
        "value": found[0],
        "low": found[1],
        "high": found[2],
        "context_tokens": latency.context if latency else math.nan,
        "verdict": "not comparable" if latency else "not run",
        "reason": reason or "other hardware (the paper: RTX 4090)",
    }


def _untimed(find: Lossless | None, method: str) -> str:
    if find is not None and find.budget is None:
        return "no budget is surely lossless"
    return f"{method} was not timed at this context and budget"


def _notes(rows: Sequence[Row], found: Sequence[Lossless], timed: bool) -> list[str]:
    first = "Bars: smallest budget surely lossless; lines and hatching: down to the largest lossy"
    notes = [first]
    if found:
        percent = f"{100 * found[0].confidence:g} %"
        notes.append(
            f"Lossless: all of the {percent} interval of score minus full's on the same samples, of"
            f" this budget and every larger one, is above -{found[0].delta:g}"
            " points; it holds however often it was looked at."
        )
        done, grid, *_ = lossless.evaluations(rows)
        notes.append(f"{done} of the grid's {grid} evaluations were needed.")
    if timed:
        notes.append(
            "Latency: one layer's attention at that budget, at the shortest timed context not below"
            " the task's mean, between timed budgets in a straight line."
        )
    else:
        notes.append(UNTIMED.capitalize() + ".")
    said = "; ".join(f"{name} {verdict}" for name, verdict in verdicts(rows).items())
    return [*notes, f"Against the paper: {said}.", CONTRADICTIONS]


def _ticks(
    axes: Sequence[Axes],
    tasks: Sequence[tuple[str, str]],
    found: Sequence[Lossless],
    rows: Sequence[Row],
) -> None:
    names = {(row.model, row.task): row.task_label for row in rows}
    several = len({model for model, _ in tasks}) > 1
    contexts = {(f.model, f.task): _context(rows, _row(rows, f)) for f in found}
    labels = [
        f"{names[place]}{f', {place[0]}' if several else ''}\n"
        f"{style.tokens(round(contexts[place]))} tokens"
        for place in tasks
    ]
    for panel in axes:
        panel.set_xticks(range(len(tasks)), labels, color=style.INK)
        panel.tick_params(axis="x", length=0)
        panel.set_xlim(-0.5, max(len(tasks), 1) - 0.5)
    budgets = sorted({row.budget for row in rows if row.budget and lossless.part(row)})
    axes[0].set_yscale("log", base=2)
    if budgets:
        top = max(row.context_tokens for row in rows if lossless.part(row))
        axes[0].set_ylim(budgets[0] / 2, top * 1.6)
        axes[0].set_yticks(budgets, [style.tokens(budget) for budget in budgets])
    axes[0].minorticks_off()
    axes[0].set_ylabel("tokens")
    if len(axes) > 1:
        axes[1].set_ylabel("attention, µs")


def _row(rows: Sequence[Row], find: Lossless) -> Row:
    """The row that a finding is about."""
    own = (find.model, find.task, find.method, find.page_size, find.dense_layers, find.at)
    return next(
        row
        for row in rows
        if (row.model, row.task, row.method, row.page_size, row.dense_layers, row.budget) == own
    )


def _context(rows: Sequence[Row], like: Row) -> float:
    """Mean context of a task's samples, as full saw them."""
    same = [r for r in rows if (*r.setting, r.task) == (*like.setting, like.task) and r.n]
    full = [r for r in same if r.budget is None] or same
    return max(full, key=lambda r: r.n).context_tokens if full else math.nan


def _place(order: Sequence[str], name: str) -> int:
    return order.index(name) if name in order else len(order)
