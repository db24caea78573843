"""What figures of times share: rows by device, the paper's times beside them, and the verdicts.

Invariants: times of one panel are from one device, model and dtype; where a table has several, each
has a line of panels of its own and the caption says so. What is drawn is relative to dense
attention measured beside it, as absolute times of other hardware say nothing; absolute times are in
the CSV. The paper's values are hollow and are compared with ours on the paper's own GPU only.
Intervals are of medians over repeats; a ratio's is of paired ratios.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from quest_dist.figures import caption as captions
from quest_dist.figures import paper, style
from quest_dist.figures.caption import Caption
from quest_dist.figures.panels import Plotted
from quest_dist.figures.paper import Verdict
from quest_dist.table import Row

PANEL = 2.75  # inches of height a line of panels takes
#: How near a median must be to the paper's value to reproduce it, where the interval allows.
TOLERANCE = 0.1
METHODS = ("full", "quest")
BLUES = ("#9ecae1", "#6baed6", "#3182bd", "#08519c", "#08306b")
Value = tuple[float, float, float]
DrawGroup = Callable[[list[Axes], "Group"], Plotted]


@dataclass(frozen=True)
class Group:
    """Rows whose times belong together."""

    device: str
    model: str
    dtype: str
    rows: tuple[Row, ...]

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.model}, {self.dtype}, on {self.device}"

    def full(self, context: int) -> Row | None:
        """Dense attention at a context; of several page sizes, the paper's."""
        found = [r for r in self.rows if r.budget is None and round(r.context_tokens) == context]
        found.sort(key=lambda row: abs(row.page_size - paper.PAGE_SIZE))
        return found[0] if found else None

    def sparse(self, context: int, page_size: int = paper.PAGE_SIZE) -> dict[int, Row]:
        """Quest's rows at a context and page size by budget."""
        found = {
            row.budget: row
            for row in self.rows
            if row.budget is not None
            and (round(row.context_tokens), row.page_size) == (context, page_size)
        }
        return dict(sorted(found.items()))

    @property
    def contexts(self) -> list[int]:
        """Contexts of its rows."""
        return sorted({round(row.context_tokens) for row in self.rows})


def groups(rows: Sequence[Row]) -> list[Group]:
    """Rows with results, by device, model and dtype. A row measured on several devices is a group
    of its own kind, under all their names."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row.n:
            device = " and ".join(row.notes("device")) or "unknown device"
            dtype = " and ".join(row.notes("dtype")) or "unknown dtype"
            found.setdefault((device, row.model_label, dtype), []).append(row)
    return [Group(*key, tuple(members)) for key, members in found.items()]


def setting(figure: str) -> dict[str, Any]:
    """The paper's times of a figure."""
    return dict(paper.reference()["times"][figure])


def fact(row: Row, name: str) -> Value:
    """A fact with its interval."""
    return row.fact(name), *row.span(name)


def inverse(value: Value) -> Value:
    """Of a positive ratio: one over it."""
    middle, low, high = value
    return 1 / middle, 1 / high, 1 / low


def scaled(value: Value, by: float) -> Value:
    """Times a number."""
    return value[0] * by, value[1] * by, value[2] * by


def judge(figure: str, group: Group, ours: Value, value: float | None) -> Verdict:
    """The verdict on one of our ratios against the paper's."""
    known = setting(figure)
    if value is None:
        return Verdict("not comparable", "the paper has no such point")
    if known["gpu"].lower() not in group.device.lower() or " and " in group.device:
        said = f"other hardware (ours {group.device}, the paper {known['gpu']})"
        return Verdict("not comparable", said, None)
    if known["model"].lower() not in group.model.lower():
        said = f"other model ({group.model}; the paper: {known['model']})"
        return Verdict("not comparable", said, None)
    middle, low, high = ours
    if math.isnan(low):
        return Verdict("not comparable", "fewer than six repeats have no interval", value)
    said = f"ours {middle:.3g} [{low:.3g}, {high:.3g}], the paper {value:.3g}"
    if not low <= value <= high:
        return Verdict("differs", said, value)
    near = abs(middle - value) <= TOLERANCE * value
    return Verdict("reproduced" if near else "within interval", said, value)


def entries(
    figure: str,
    part: str,
    group: Group,
    row: Row,
    quantity: str,
    ours: Value,
    absolute: Value,
    theirs: float | None,
    their_absolute: float | None,
) -> Plotted:
    """CSV lines of one of our values (a ratio, with the time that it is of) and of the paper's."""
    verdict = judge(figure, group, ours, theirs)
    unit = row.metric.rpartition("_")[2]
    line = {
        "series": "measured",
        "part": part,
        "quantity": quantity,
        "context": round(row.context_tokens),
        "budget": row.budget,
        "page_size": row.page_size,
        "value": ours[0],
        "low": ours[1],
        "high": ours[2],
        "time": absolute[0],
        "time_low": absolute[1],
        "time_high": absolute[2],
        "unit": unit,
        "n": row.n,
        "status": row.status,
        "device": group.device,
        "model": group.model,
        "dtype": group.dtype,
        "verdict": verdict.verdict,
        "reason": verdict.reason,
        "point": row.point,
    }
    if theirs is None:
        return [line]
    known = setting(figure)
    blank = dict.fromkeys(("low", "high", "time_low", "time_high"), math.nan)
    other = {"series": "paper", "value": theirs, "time": their_absolute, "n": None, "status": ""}
    where = {"device": known["gpu"], "model": known["model"], "dtype": "float16"}
    return [line, line | blank | other | where]


def overall(figure: str, rows: Sequence[Row], plotted: Plotted, part: str) -> Verdict:
    """The verdict of one part of a figure from what was plotted of it."""
    found = [
        (line["verdict"], line["reason"])
        for line in plotted
        if line["series"] == "measured" and line["part"] == part
    ]
    each = [Verdict(word, why, 0.0 if word in paper.ORDER[:3] else None) for word, why in found]
    if each:
        compared = [v for v in each if not v.reason.startswith("the paper has no")]
        return paper.worst(compared or each)
    failed = next((row for row in rows if row.status == "failed"), None)
    return Verdict("not run", failed.error if failed else "no points")


def whisker(axes: Axes, x: float, value: Value, color: str = style.INK) -> None:
    """The interval of a mark."""
    if not math.isnan(value[1]):
        axes.vlines([x], value[1], value[2], color=color, lw=1.4, alpha=0.7, zorder=6)


def page(
    figure_name: str,
    title: str,
    rows: Sequence[Row],
    caption: Caption,
    heads: Sequence[str],
    draw_group: DrawGroup,
    notes: Sequence[str],
    parts: Sequence[str],
) -> tuple[Figure, Plotted]:
    """A line of panels a group, under one caption that says how its times were taken."""
    found = groups(rows) or [Group("no device", _models(rows), "", ())]
    # What is drawn decides the verdicts that the caption holds, so a first drawing is thrown away.
    trial = style.canvas(3.0)
    plotted = [
        line for group in found for line in draw_group([trial.add_subplot() for _ in heads], group)
    ]
    said = "; ".join(f"{part}: {overall(figure_name, rows, plotted, part)}" for part in parts)
    notes = [*taken(found), *notes, f"Against the paper: {said}."]
    lines = len(captions.small_print(rows, caption, [*notes, captions.lacking(rows)]))
    headed = 0.22 if len(found) > 1 else 0.0
    height = captions.HEAD + len(found) * (PANEL + headed) + 0.75 + lines * captions.LINE
    figure = style.canvas(height)
    bottom, top = captions.put(figure, title, rows, caption, notes)
    box = {"left": 0.07, "right": 0.985, "bottom": bottom + 0.42 / height}
    top -= (0.3 + headed) / height
    spec = figure.add_gridspec(
        len(found), len(heads), top=top, hspace=0.42 + 0.1 * (len(found) > 1), wspace=0.27, **box
    )
    for i, group in enumerate(found):
        axes = [figure.add_subplot(spec[i, j]) for j in range(len(heads))]
        for panel, head in zip(axes, heads, strict=True):
            panel.set_title(head, loc="left", weight="bold", size=9, pad=6)
        draw_group(axes, group)
        if headed:
            above = axes[0].get_position().y1 + 0.3 / height
            figure.text(0.012, above, group.title, size=9, weight="bold", va="bottom")
    return figure, plotted


def taken(found: Sequence[Group]) -> list[str]:
    """How the times were taken, as their rows note it: the first notes of a caption."""
    lines = ["Bars: 95 % intervals of the median over repeats, cut at the frame"]
    if len(found) > 1:
        lines.append(
            "Several devices, models or dtypes: a line of panels each; their times do not belong"
            " together."
        )
    for group in found:
        if group.rows:
            words = {
                name: "; ".join(dict.fromkeys(t for row in group.rows for t in row.notes(name)))
                for name in ("shape", "cache", "warm_up", "cuda_graphs")
            }
            lines.append(
                f"{group.title}; {words['shape']}. Cache {words['cache']}. {words['warm_up']}."
                f" CUDA graphs {words['cuda_graphs']}."
            )
    return lines


def _models(rows: Sequence[Row]) -> str:
    return ", ".join(dict.fromkeys(row.model_label for row in rows))
