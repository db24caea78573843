"""A part of the packed benchmark: what is kept in few bits, beside the same in bf16, in one run.

A part times its sides in turn on buffers that rotate past the last-level cache (see `timing`), the
unpacked baseline among them, and gives rows of one table, its figures and their targets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quest_dist.timing import Times, paired, spread

COLUMNS = ("what", "side", "us", "p10", "p90", "low", "high", "MB", "GB/s", "x baseline")


@dataclass(frozen=True)
class Part:
    """Rows under COLUMNS, accepted figures by name, their targets, and the setting."""

    rows: Sequence[Sequence[Any]]
    summary: Mapping[str, Any]
    setting: Mapping[str, Any]
    targets: Mapping[str, str] = field(default_factory=dict)


def table(what: str, times: Times, baseline: str) -> list[tuple[Any, ...]]:
    """One row a side: microseconds a call, what it must read, and its time in the baseline's."""
    rows: list[tuple[Any, ...]] = []
    for side, moved in times.moved.items():
        us = times.us(side)
        found, size = spread(us), sum(moved.values())
        of_calls = (found.median, found.p10, found.p90, found.low, found.high)
        rate = size / found.median / 1000
        rows.append((what, side, *of_calls, size / 1e6, rate, paired(us, times.us(baseline))))
    return rows
