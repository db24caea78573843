"""The table of points: one row per point, everything a figure, a tracker or a reader needs of it.

Invariants: rows are a pure function of points and records; a row without records is still a row
(`missing`); NaN means "not known" and is an empty cell in the CSV; its CSV reads back equal.
Every difference with full is paired over the samples both have.
"""

from __future__ import annotations

import csv
import functools
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from quest_dist import details, stats
from quest_dist.details import Dot

if TYPE_CHECKING:
    from quest_dist.plan import Point

Record = Mapping[str, Any]


class Records(Protocol):
    """Where records come from: the ledger, or anything that answers as it does."""

    def records(self, point: str) -> Sequence[Record]:
        """Records of a point key by sample: finished, or with an `error` and no score."""


@dataclass(frozen=True)
class Row:
    """One point, summed up. Scores in the metric's unit, sizes in tokens, time in seconds."""

    point: str
    model: str
    task: str
    method: str
    data: str
    label: str
    budget: int | None  # None: the method has no budget (full)
    page_size: int
    dense_layers: int
    protocol: str
    seed: int
    metric: str  # as its records name it; empty where the task has none yet
    n: int  # samples scored
    n_expected: int
    score: float
    low: float  # 95 % interval of the score
    high: float
    pairs: int  # samples shared with full
    delta: float  # score minus full's over those pairs
    delta_low: float
    delta_high: float
    attended: float  # measured mean tokens attended per query head and decode step
    planned: float  # what the budget promised
    read: float  # mean tokens read per kv head: the union over its group
    context_tokens: float
    new_tokens: float
    seconds: float  # sum over samples of the decode time shared by a batch's rows
    truncated: int  # samples whose context was cut to the model's limit
    finished_at: float  # unix time of the last record
    status: str  # finished | partial | failed | missing
    error: str
    model_label: str
    task_label: str
    details: str = "{}"  # canonical JSON: see quest_dist.details

    @property
    def curve_dots(self) -> tuple[Dot, ...]:
        """The point's own curve (perplexity by position, loss by layer, ...); mostly empty."""
        return details.dots(self.details)

    @property
    def versus_full(self) -> tuple[Dot, ...]:
        """That curve minus full's, paired over the samples both have; empty for full itself."""
        return details.dots(self.details, "versus_full")

    def fact(self, name: str) -> float:
        """The mean of what was measured beside the score; NaN where it was not."""
        return details.fact(self.details, name)

    def span(self, name: str) -> tuple[float, float]:
        """The 95 % interval of a time's fact; NaN where it has none."""
        return details.span(self.details, name)

    def notes(self, name: str) -> tuple[str, ...]:
        """The distinct texts of one note, such as the devices that were timed."""
        return details.notes(self.details, name)

    @property
    def setting(self) -> tuple[object, ...]:
        """What rows must share to stand in one panel, the task aside."""
        return (self.model, self.data, self.protocol, self.seed)

    @property
    def curve(self) -> tuple[object, ...]:
        """What rows must share to be dots of one line: all but the budget."""
        where = (*self.setting, self.task)
        return (*where, self.method, self.label, self.page_size, self.dense_layers)


@dataclass
class Made:
    """What `rows` made before of one ledger, so that it makes again only what has changed since.

    `version` gives of a point's key a number that differs whenever its records do.
    """

    version: Callable[[str], int]
    metrics: dict[str, tuple[int, str]] = field(default_factory=dict)
    rows: dict[tuple[str, str, int, str], tuple[int, int, Row]] = field(default_factory=dict)


def rows(
    points: Sequence[Point],
    ledger: Records,
    expected: Mapping[str, int],
    made: Made | None = None,
) -> list[Row]:
    """The table, in the order of the points; `expected` maps a key to the samples asked for, and
    `made` keeps what the next call need not make again."""
    made = Made(lambda point: 0) if made is None else made
    # Before the records are read: what arrives meanwhile then makes a row once too often.
    version = {point.key: made.version(point.key) for point in points}
    read = functools.cache(ledger.records)
    metrics: dict[str, str] = {}
    for point in points:
        if made.metrics.get(point.key, (-1,))[0] != version[point.key]:
            metric = next((str(record["metric"]) for record in read(point.key)), "")
            made.metrics[point.key] = (version[point.key], metric)
        if metric := made.metrics[point.key][1]:
            metrics[point.task.name] = metric
    bases = full_of(points)
    table = []
    for point in points:
        base = bases[point.key].key if point.key in bases else ""
        count, metric = expected.get(point.key, 0), metrics.get(point.task.name, "")
        place, now = (point.key, base, count, metric), (version[point.key], version.get(base, 0))
        if place not in made.rows or made.rows[place][:2] != now:
            row = _row(point, read(point.key), read(base) if base else (), count, metric)
            made.rows[place] = (*now, row)
        table.append(made.rows[place][2])
    return table


def full_of(points: Sequence[Point]) -> dict[str, Point]:
    """The full that each point is compared with, by the point's key; points without one are not in.

    Full attention reads the same tokens whatever the page size, so any full will do.
    """
    found: dict[str, Point] = {}
    for point in points:
        if point.method.name == "full":
            found[point.family] = point
            found.setdefault(point.ground, point)
    bases = {p.key: found.get(p.family) or found.get(p.ground) for p in points}
    return {key: base for key, base in bases.items() if base is not None}


def _row(
    point: Point, records: Sequence[Record], full: Sequence[Record], expected: int, metric: str
) -> Row:
    found = [r for r in records if r["error"] is None]
    failures = [r for r in records if r["error"] is not None]
    scores = {r["sample"]: float(r["score"]) for r in found}
    full = [r for r in full if r["error"] is None]
    reference = {r["sample"]: float(r["score"]) for r in full}
    shared = sorted(scores.keys() & reference.keys())
    score = stats.summary(list(scores.values()), metric)
    delta = stats.paired([scores[s] for s in shared], [reference[s] for s in shared], metric)
    if failures:
        status = "failed"
    elif not found:
        status = "missing"
    else:
        status = "finished" if score.n >= expected else "partial"
    return Row(
        point=point.key,
        model=point.model.name,
        task=point.task.name,
        method=point.method.name,
        data=point.data.name,
        label=point.method.label,
        budget=point.budget,
        page_size=point.page_size,
        dense_layers=point.dense_layers,
        protocol=point.protocol.name,
        seed=point.seed,
        metric=metric,
        n=score.n,
        n_expected=expected,
        score=score.value,
        low=score.low,
        high=score.high,
        pairs=delta.n,
        delta=delta.value,
        delta_low=delta.low,
        delta_high=delta.high,
        attended=_mean(found, "attended"),
        planned=_mean(found, "planned"),
        read=_mean(found, "read"),
        context_tokens=_mean(found, "context_tokens"),
        new_tokens=_mean(found, "new_tokens"),
        seconds=math.fsum(float(r["seconds"]) for r in found),
        truncated=sum(bool(r.get("truncated")) for r in found),
        finished_at=max((float(r["finished_at"]) for r in records), default=math.nan),
        status=status,
        error=last_line(str(failures[0]["error"])) if failures else "",
        model_label=point.model.label,
        task_label=point.task.label,
        details=details.summed(found, metric, full if point.method.name != "full" else ()),
    )


def last_line(error: str) -> str:
    """The line of an error text that names the error, cut to what fits a cell."""
    return (error.strip() or "unknown error").splitlines()[-1][:500]


def _mean(records: Sequence[Record], key: str) -> float:
    values = [float(r[key]) for r in records if r.get(key) is not None]
    return math.fsum(values) / len(values) if values else math.nan


def to_csv(table: Iterable[Row]) -> str:
    """The table as CSV text, one header line; None and NaN are empty cells."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in fields(Row)], lineterminator="\n")
    writer.writeheader()
    for row in table:
        writer.writerow({key: _cell(value) for key, value in vars(row).items()})
    return text.getvalue()


def from_csv(text: str | Path) -> list[Row]:
    """Rows back from CSV text, or from the file at a Path."""
    if isinstance(text, Path):
        text = text.read_text(encoding="utf-8")
    reader = csv.DictReader(io.StringIO(text))
    names = {f.name for f in fields(Row)}
    lacking = names - set(reader.fieldnames or ())
    if lacking:
        raise ValueError(f"table: no column {sorted(lacking)[0]!r}; need {', '.join(names)}")
    types = {f.name: str(f.type) for f in fields(Row)}
    return [
        Row(**{name: _value(types[name], line[name]) for name in types})  # type: ignore[arg-type]
        for line in reader
    ]


def _cell(value: object) -> object:
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else value


def _value(kind: str, cell: str) -> object:
    if kind == "str":
        return cell
    if kind == "float":
        return float(cell) if cell else math.nan
    return int(cell) if cell else None


@dataclass(frozen=True)
class Line:
    """One line of a panel: a method's rows by budget; `flat` is the row without a budget."""

    method: str
    label: str
    by_budget: Mapping[int, Row]
    flat: Row | None

    def rows(self) -> list[Row]:
        """All its rows."""
        return [*([self.flat] if self.flat else []), *self.by_budget.values()]


@dataclass(frozen=True)
class Panel:
    """What is compared with each other: one task under one model, data and protocol."""

    task: str
    title: str
    model: str
    model_label: str
    data: str
    metric: str
    budgets: tuple[int, ...]
    lines: tuple[Line, ...]


def pivot(table: Sequence[Row]) -> list[Panel]:
    """The table arranged for reading: panels in the order of the rows, lines in theirs.

    A line's label names page size or dense layers where the table has several, so that no two lines
    of a panel share a label unless they are the same method and setting.
    """
    grouped: dict[tuple[object, ...], dict[tuple[object, ...], list[Row]]] = {}
    for row in table:
        grouped.setdefault((*row.setting, row.task), {}).setdefault(row.curve, []).append(row)
    budgeted = [row for row in table if row.budget is not None]
    sizes = len({row.page_size for row in budgeted}) > 1
    depths = len({row.dense_layers for row in budgeted}) > 1
    panels = []
    for curves in grouped.values():
        first = next(iter(curves.values()))[0]
        lines = [_line(members, sizes, depths) for members in curves.values()]
        budgets = sorted({budget for line in lines for budget in line.by_budget})
        where = (first.task, first.task_label, first.model, first.model_label, first.data)
        panels.append(Panel(*where, first.metric, tuple(budgets), tuple(lines)))
    return panels


def _line(members: Sequence[Row], sizes: bool, depths: bool) -> Line:
    """A curve's line; `sizes` and `depths`: the table has several page sizes, or dense layers."""
    first = members[0]
    label = first.label
    if first.budget is not None:  # full depends on neither
        label += f", page {first.page_size}" if sizes else ""
        label += f", {first.dense_layers} dense" if depths else ""
    by_budget = {row.budget: row for row in members if row.budget is not None}
    flat = next((row for row in members if row.budget is None), None)
    return Line(first.method, label, dict(sorted(by_budget.items())), flat)
