"""The latency of attention at a budget that was not timed, from the times that were.

Invariants: a time is one of the method itself, at the shortest timed context that is not shorter
than asked, between the two nearest timed budgets (in a straight line: attention reads what it
attends to); there is none beyond them, and none where the method was not timed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from quest_dist.table import Row

METRIC = "attention_us"


@dataclass(frozen=True)
class Latency:
    """Microseconds of one layer's attention in a decode step, with the interval of its times."""

    value: float
    low: float
    high: float
    context: float  # tokens of the timed context


def at(
    rows: Iterable[Row], like: Row, method: str, budget: int | None, context: float
) -> Latency | None:
    """The latency of a method under `like`'s model at a budget (None: full) and context.

    `rows` may hold anything; None where nothing was timed that says it.
    """
    timed = [
        row
        for row in rows
        if row.metric == METRIC
        and row.n
        and (row.model, row.method) == (like.model, method)
        and (budget is None or row.page_size == like.page_size)
        and row.context_tokens >= context
    ]
    if not timed:
        return None
    shortest = min(row.context_tokens for row in timed)
    here = [row for row in timed if row.context_tokens == shortest]
    if budget is None:
        return _of(here[0])
    return _between(sorted(here, key=lambda row: row.budget or 0), budget)


def _between(rows: Sequence[Row], budget: int) -> Latency | None:
    for row in rows:
        if row.budget == budget:
            return _of(row)
    for below, above in pairwise(rows):
        if below.budget is not None and above.budget and below.budget < budget < above.budget:
            share = (budget - below.budget) / (above.budget - below.budget)
            a, b = _of(below), _of(above)
            low, value, high = (
                (1 - share) * x + share * y
                for x, y in ((a.low, b.low), (a.value, b.value), (a.high, b.high))
            )
            return Latency(value, low, high, a.context)
    return None


def _of(row: Row) -> Latency:
    low, high = (row.score if math.isnan(end) else end for end in (row.low, row.high))
    return Latency(row.score, low, high, row.context_tokens)
