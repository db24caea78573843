"""Timing: the sides of a comparison in turn, again and again, each call on memory that is cold.

A *visit* to a side is a few calls in a row, the first of them uncounted where the side is short
(it wakes threads); a *cycle* visits every side once, with a pause between them in which the threads
of the side before fall asleep. Drift of the machine so hits all sides alike.

A ratio of two sides is *paired*: the median over cycles of (median of the one side's visit / median
of the other's in the same cycle). Times of one side are the median, p10 and p90 of all its counted
calls.

A step is over when its function returns, as the ops of a CPU do, and the clock stands in `timed`;
where ops are only launched, `graphs` makes the visits.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

#: Longer than idle threads of torch's pool spin.
SETTLE_SECONDS = 0.01
FEWEST_CYCLES, MOST_CYCLES = 5, 60
#: Calls of a visit; a side that is slow and wakes nobody may do with fewer.
UNCOUNTED, COUNTED = 1, 3

Step = Callable[[int], object]
#: The microseconds of each step of every counted call of one visit to a side.
Visit = Callable[["Side"], list[tuple[float, ...]]]


@dataclass
class Rotation:
    """Buffers that take turns; sides on the same buffers share the rotation."""

    buffers: int
    turn: int = -1

    def next(self) -> int:
        """The number of the buffer that has waited longest."""
        self.turn = (self.turn + 1) % self.buffers
        return self.turn


@dataclass(frozen=True)
class Side:
    """What is timed: `steps` one after the other on one buffer, each moving so many bytes."""

    name: str
    steps: Mapping[str, Step]
    moved: tuple[int, ...]
    rotation: Rotation = field(default_factory=lambda: Rotation(1))
    uncounted: int = UNCOUNTED
    counted: int = COUNTED


class Spread(NamedTuple):
    """Of all counted calls of a side."""

    median: float
    p10: float
    p90: float
    calls: int


@dataclass(frozen=True)
class Times:
    """Microseconds of every step of every counted call, by side and cycle.

    `moved` are the bytes of a side's steps by name. Nothing here holds on to what was timed.
    """

    visits: dict[str, list[list[tuple[float, ...]]]]
    moved: dict[str, dict[str, int]]

    def us(self, side: str, *steps: str) -> list[list[float]]:
        """The calls' times by cycle: of all steps together, or of those named."""
        chosen = [
            number for number, name in enumerate(self.moved[side]) if not steps or name in steps
        ]
        return [
            [sum(call[number] for number in chosen) for call in visit]
            for visit in self.visits[side]
        ]

    def rate(self, side: str, *steps: str) -> list[list[float]]:
        """Bytes a microsecond, which is MB/s, by cycle."""
        parts = self.moved[side].items()
        moved = sum(size for name, size in parts if not steps or name in steps)
        return [[moved / us for us in visit] for visit in self.us(side, *steps)]


def timed(side: Side) -> tuple[float, ...]:
    """One call on the next buffer: the microseconds of each step."""
    buffer = side.rotation.next()
    marks = [time.perf_counter_ns()]
    for step in side.steps.values():
        step(buffer)
        marks.append(time.perf_counter_ns())
    return tuple((after - before) / 1000 for before, after in itertools.pairwise(marks))


def by_call(side: Side) -> list[tuple[float, ...]]:
    """Calls one by one, where a step is over when it returns."""
    time.sleep(SETTLE_SECONDS)
    for _ in range(side.uncounted):
        timed(side)
    return [timed(side) for _ in range(side.counted)]


def measure(sides: Sequence[Side], seconds: float, visit: Visit = by_call) -> Times:
    """Cycles for about so many seconds, after one that is not counted."""
    visits: dict[str, list[list[tuple[float, ...]]]] = {side.name: [] for side in sides}
    start = 0.0
    for cycle in range(MOST_CYCLES + 1):
        if cycle == 1:
            start = time.perf_counter()
        if cycle > FEWEST_CYCLES and time.perf_counter() - start > seconds:
            break
        for side in sides:
            calls = visit(side)
            if cycle:
                visits[side.name].append(calls)
    moved = {side.name: dict(zip(side.steps, side.moved, strict=True)) for side in sides}
    return Times(visits, moved)


def spread(visits: Sequence[Sequence[float]]) -> Spread:
    """Of the calls of all cycles."""
    values = [value for visit in visits for value in visit]
    if len(values) == 1:
        return Spread(values[0], values[0], values[0], 1)
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return Spread(statistics.median(values), tenths[0], tenths[-1], len(values))


def paired(ones: Sequence[Sequence[float]], others: Sequence[Sequence[float]]) -> float:
    """The ratio of one side to another, cycle by cycle, as the module says."""
    return statistics.median(
        statistics.median(one) / statistics.median(other)
        for one, other in zip(ones, others, strict=True)
    )


def buffers_needed(calls: list[tuple[int, bool]], distance: int) -> int:
    """The fewest buffers for which `distance` bytes of other memory are read before one returns.

    `calls` are those of a cycle in order: the bytes that each reads at least, and whether it takes
    the next buffer of the rotation.
    """
    rotating = sum(takes for _, takes in calls)
    assert rotating, "no call takes a buffer"
    for buffers in itertools.count(2):
        left: dict[int, int] = {}
        total, turn, far = 0, 0, True
        for size, takes in calls * (buffers // rotating + 2):
            if takes:
                far = far and total - left.get(turn, -distance) >= distance
            total += size
            if takes:
                left[turn] = total
                turn = (turn + 1) % buffers
        if far:
            return buffers
    raise AssertionError("unreachable")
