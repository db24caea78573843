"""Details: what a point measured beside its score, summed over its samples into one JSON text.

    curve    [[x, value, low, high, n], ...]  a point's own curve, by x
    versus_full  the same                     its differences from full on the same samples
    facts    {name: mean}                     numbers beside the score, such as the parts of a time
    spans    {name: [low, high]}              of a time's facts, which are then medians: their 95 %
                                              intervals over samples
    notes    {name: [texts]}                  distinct texts, such as the devices that were timed
    drawing  anything                         of the first sample that has one

Invariants: a pure function of records; absent parts are left out; the text is canonical, so equal
details are equal strings, and a row that carries them is read back from CSV as it was.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from quest_dist import stats
from quest_dist.spec import canonical


class Dot(NamedTuple):
    """One x of a curve: the value over `n` samples with its 95 % interval."""

    x: float
    value: float
    low: float
    high: float
    n: int


def summed(
    records: Sequence[Mapping[str, Any]],
    metric: str,
    full: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The details of a point's finished records; `metric` says how samples are summed up, `full`
    are the finished records of full attention that it is compared with, if there are any."""
    facts, spans = _facts(records, metric)
    parts: dict[str, Any] = {
        "versus_full": [_plain(dot) for dot in _versus(records, full, metric)],
        "curve": [_plain(dot) for dot in _curve(records, metric)],
        "facts": facts,
        "spans": spans,
        "notes": _notes(records),
        "drawing": next(filter(None, (_part(r, "drawing") for r in records)), None),
    }
    return canonical({name: part for name, part in parts.items() if part})


def read(text: str) -> dict[str, Any]:
    """The parts of a row's details."""
    return dict(json.loads(text or "{}"))


def dots(text: str, part: str = "curve") -> tuple[Dot, ...]:
    """The curve of a row's details, or its differences from full (`versus_full`), by x."""
    known = [
        [math.nan if number is None else number for number in dot]
        for dot in read(text).get(part, ())
    ]
    return tuple(Dot._make(dot) for dot in known)


def fact(text: str, name: str) -> float:
    """One fact of a row's details; NaN where it has none."""
    return float(read(text).get("facts", {}).get(name, math.nan))


def span(text: str, name: str) -> tuple[float, float]:
    """The interval of one fact of a time; NaN where it has none."""
    low, high = read(text).get("spans", {}).get(name, (math.nan, math.nan))
    return float(low), float(high)


def notes(text: str, name: str) -> tuple[str, ...]:
    """The distinct texts of one note of a row's details."""
    return tuple(read(text).get("notes", {}).get(name, ()))


def _part(record: Mapping[str, Any], name: str) -> Any:
    return (record.get("details") or {}).get(name)


def _curve(records: Sequence[Mapping[str, Any]], metric: str) -> list[Dot]:
    by_x: dict[float, list[float]] = {}
    for record in records:
        for x, y in _part(record, "curve") or ():
            by_x.setdefault(float(x), []).append(float(y))
    found = []
    for x in sorted(by_x):
        value, low, high, n = vars(stats.summary(by_x[x], metric)).values()
        found.append(Dot(x, value, low, high, n))
    return found


def _versus(
    records: Sequence[Mapping[str, Any]], full: Sequence[Mapping[str, Any]], metric: str
) -> list[Dot]:
    """By x, the point's curve minus full's over the samples that have both."""
    base = {(r["sample"], float(x)): float(y) for r in full for x, y in _part(r, "curve") or ()}
    pairs: dict[float, list[tuple[float, float]]] = {}
    for record in records if base else ():
        for x, y in _part(record, "curve") or ():
            if (record["sample"], float(x)) in base:
                pairs.setdefault(float(x), []).append((float(y), base[record["sample"], float(x)]))
    found = []
    for x in sorted(pairs):
        ours, fulls = zip(*pairs[x], strict=True)
        value, low, high, n = vars(stats.paired(ours, fulls, metric)).values()
        found.append(Dot(x, value, low, high, n))
    return found


def _plain(dot: Dot) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in dot]


def _facts(
    records: Sequence[Mapping[str, Any]], metric: str
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Facts, and of a time their intervals."""
    found: dict[str, list[float]] = {}
    for record in records:
        for name, value in (record.get("metrics") or {}).items():
            found.setdefault(name, []).append(float(value))
    if metric in stats.TIMES:
        each = {name: stats.median(values) for name, values in sorted(found.items())}
        sure = {name: [e.low, e.high] for name, e in each.items() if math.isfinite(e.low)}
        return {n: e.value for n, e in each.items() if math.isfinite(e.value)}, sure
    means = {name: math.fsum(values) / len(values) for name, values in sorted(found.items())}
    return {name: mean for name, mean in means.items() if math.isfinite(mean)}, {}


def _notes(records: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    found: dict[str, set[str]] = {}
    for record in records:
        for name, text in (_part(record, "notes") or {}).items():
            found.setdefault(name, set()).add(str(text))
    return {name: sorted(texts) for name, texts in sorted(found.items())}
