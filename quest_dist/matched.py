"""Matched accuracy: a search among a sweep's points, between the ledger and the rules of search.py.

A curve is what its points share (model, task, method, ...) but the budget; times are no curves and
run whole. `asked` is what the ledger must hold next, and when it holds all of it, all that was
needed. `told` puts what is known of each point into its row's details, where `lossless` and
figures read it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from quest_dist import details
from quest_dist.plan import Point
from quest_dist.search import METRICS, Followed, Search, follow
from quest_dist.stats import TIMES
from quest_dist.table import Record, Row, full_of


class Records(Protocol):
    """What is asked of the ledger."""

    def records(self, point: str) -> Sequence[Record]:
        """Records of a point key by sample: finished, or with an `error` and no score."""


class Nothing:
    """Where there is no ledger yet."""

    def records(self, point: str) -> Sequence[Record]:
        """None."""
        return ()


NOTHING = Nothing()


@dataclass(frozen=True)
class Curve:
    """The points of one curve by budget, and the full that they are compared with."""

    full: Point
    points: Mapping[int, Point]


def check(points: Sequence[Point], metrics: Mapping[str, str]) -> None:
    """Raise ValueError where there is nothing to search in, or nothing to compare it with."""
    bounded = [p for p in points if metrics[p.key] not in TIMES]
    for point in bounded:
        if metrics[point.key] not in METRICS:
            raise ValueError(
                f"search: task {point.task.name} is scored in {metrics[point.key]}; a search needs"
                f" scores of 0 to 100 ({', '.join(sorted(METRICS))})"
            )
    bases = full_of(points)
    for point in bounded:
        if point.key not in bases:
            raise ValueError(
                f"search: nothing to compare {point.method.name} on {point.task.name} with;"
                " grid.method needs full, and exclude must not drop it"
            )
    found = curves(bounded)
    if not found:
        methods = ", ".join(dict.fromkeys(p.method.name for p in points))
        raise ValueError(f"search: no method with a budget in grid.method=[{methods}]")
    for curve in found:
        if len(curve.points) < 2:
            (only,) = curve.points.values()
            raise ValueError(
                f"search: {only.method.name} on {only.task.name} has one budget, {only.budget};"
                " grid.budget needs at least two to choose from"
            )


def curves(points: Sequence[Point]) -> list[Curve]:
    """The curves that a search decides on, in the order of the points."""
    bases = full_of(points)
    found: dict[str, dict[int, Point]] = {}
    for point in points:
        if point.budget is not None and point.key in bases:
            found.setdefault(replace(point, budget=None).key, {})[point.budget] = point
    return [Curve(bases[next(iter(m.values())).key], m) for m in found.values()]


def asked(
    search: Search,
    points: Sequence[Point],
    counts: Mapping[str, int],
    timed: frozenset[str],
    ledger: Records,
    tried: Mapping[str, int],
) -> dict[str, int]:
    """How many samples each point must have by now, at most `counts`.

    `timed` are the keys of points that are times. `tried` says how many samples of a point this
    launch has run: what failed among them is left as it is, what failed before is tried again.
    """
    if search.delta is None:
        return dict(counts)
    wanted = {point.key: counts[point.key] if point.key in timed else 0 for point in points}
    for curve, followed in _followed(search, points, counts, timed, ledger, tried):
        for budget, look in followed.looks.items():
            wanted[curve.points[budget].key] = look.asked
        wanted[curve.full.key] = max(wanted[curve.full.key], followed.asked)
    return wanted


def told(
    search: Search,
    points: Sequence[Point],
    counts: Mapping[str, int],
    timed: frozenset[str],
    ledger: Records,
    rows: Sequence[Row],
) -> list[Row]:
    """The rows of the points, with what a search knows of each in its details."""
    if search.delta is None:
        return list(rows)
    failed = {p.key: counts[p.key] for p in points}  # nothing is tried again for what is printed
    parts: dict[str, dict[str, Any]] = {}
    common = {"delta": search.delta, "confidence": search.confidence}
    for curve, followed in _followed(search, points, counts, timed, ledger, failed):
        for budget, look in followed.looks.items():
            key = curve.points[budget].key
            parts[key] = {**common, **vars(look), "samples": counts[key]}
        full = parts.setdefault(curve.full.key, {**common, "asked": 0})
        full |= {"asked": max(full["asked"], followed.asked), "samples": counts[curve.full.key]}
    return [
        replace(row, details=details.joined(row.details, "search", parts[row.point]))
        if row.point in parts
        else row
        for row in rows
    ]


def _followed(
    search: Search,
    points: Sequence[Point],
    counts: Mapping[str, int],
    timed: frozenset[str],
    ledger: Records,
    tried: Mapping[str, int],
) -> list[tuple[Curve, Followed]]:
    result = []
    for curve in curves([point for point in points if point.key not in timed]):
        scores: dict[int | None, dict[int, float]] = {}
        known: dict[int | None, set[int]] = {}
        for budget, point in ((None, curve.full), *curve.points.items()):
            records = ledger.records(point.key)
            found = {int(r["sample"]): r["score"] for r in records}
            scores[budget] = {s: float(score) for s, score in found.items() if score is not None}
            given_up = {
                s for s, score in found.items() if score is None and s < tried.get(point.key, 0)
            }
            known[budget] = scores[budget].keys() | given_up
        full = scores.pop(None)
        followed = follow(
            search,
            full,
            {budget: own for budget, own in scores.items() if budget is not None},
            counts[curve.full.key],
            lambda budget, n, known=known: known[budget] >= set(range(n)),  # type: ignore[misc]
        )
        result.append((curve, followed))
    return result
