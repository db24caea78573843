"""Timing: the contract that every latency of this project keeps, and the code that keeps it.

The sides of a comparison run in turn, again and again, in one process. A *visit* to a side is a few
calls in a row, the first of them uncounted where the side is short (it wakes threads); a *cycle*
visits every side once, with a pause between them in which the threads of the side before fall
asleep. Drift of the machine so hits all sides alike. A *repeat* is one cycle of a benchmark, or one
sample of a sweep, which has caches of its own.

What each number is:
    median      p50 of all counted calls of a side, in microseconds of wall clock on a CPU, between
                two events of the stream on a GPU
    p5 to p95   of the same calls
    low, high   95 % interval of the median over repeats (each repeat gives the median of its
                calls): order statistics, no assumption on the distribution; six repeats are the
                fewest that have one (`stats.median`)
    first       the first call of all, which loads, allocates and wakes; never among the others
    wall        of a GPU: host microseconds a call, between a synchronisation before the first and
                one after the last call of a visit; it holds what events do not see
    ratio       paired: the median over cycles of (median of the one side's visit / median of the
                other's in the same cycle)

The contract: the device has finished all before at the first mark and all measured at the last;
`WARM_UP` calls of each side are made and dropped; at least FEWEST_CYCLES repeats; a fixed number of
decoded tokens, whatever they are (no end token ends a step), whose growth of the context is stated;
every call on memory that is cold (`REUSE`), or what stays in caches stated; dense attention through
the same code; CUDA graphs on or off, and the machine's state before and after, stated
(`contract`, `machine_state`).

A step is over when its function returns, as the ops of a CPU do, and the clock stands in `timed`;
where ops are only launched, `graphs` makes the visits. That part has not been run on a GPU yet.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from quest_dist import stats

#: Longer than idle threads of torch's pool spin.
SETTLE_SECONDS = 0.01
FEWEST_CYCLES, MOST_CYCLES = 6, 60
#: Calls of a side that are made and dropped before any counts. A GPU needs more: its clocks rise.
WARM_UP = {"cpu": 4, "cuda": 20}
#: In units of the last-level cache: bytes between two uses of a buffer, and of a read's own buffer.
REUSE, READ = 4, 8
#: Calls of a visit; a side that is slow and wakes nobody may do with fewer.
UNCOUNTED, COUNTED = 1, 3

Step = Callable[[int], object]
#: The microseconds of each step of every counted call of one visit to a side.
Visit = Callable[["Side"], list[tuple[float, ...]]]


def warm_up(asked: int | None, device: str) -> int:
    """Calls to drop on a device (cpu, cuda): as asked, by default WARM_UP; ValueError for fewer
    than that on a GPU."""
    if asked is None:
        return WARM_UP[device]
    if device == "cuda" and asked < WARM_UP[device]:
        raise ValueError(f"warm_up={asked}: a GPU needs at least {WARM_UP[device]}")
    return asked


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
    """Of all counted calls of a side, as the module says; `low` and `high` are over repeats."""

    median: float
    p5: float
    p10: float
    p90: float
    p95: float
    low: float
    high: float
    calls: int
    repeats: int


@dataclass(frozen=True)
class Times:
    """Microseconds of every step of every counted call, by side and cycle.

    `moved` are the bytes of a side's steps by name, `first` the time of its first call of all,
    `walls` (of a GPU) the host's of each visit, a call. Nothing here holds on to what was timed.
    """

    visits: dict[str, list[list[tuple[float, ...]]]]
    moved: dict[str, dict[str, int]]
    first: dict[str, float] = field(default_factory=dict)
    walls: dict[str, list[float]] = field(default_factory=dict)

    def us(self, side: str, *steps: str) -> list[list[float]]:
        """The calls' times by cycle: of all steps together, or of those named."""
        chosen = [
            number for number, name in enumerate(self.moved[side]) if not steps or name in steps
        ]
        return [
            [sum(call[number] for number in chosen) for call in visit]
            for visit in self.visits[side]
        ]

    def hosts(self) -> dict[str, float]:
        """The host's median microseconds a call of each side of a GPU."""
        return {name: statistics.median(walls) for name, walls in self.walls.items() if walls}

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


def measure(
    sides: Sequence[Side],
    seconds: float,
    visit: Visit = by_call,
    *,
    warm_up: int = WARM_UP["cpu"],
    cycles: int | None = None,
) -> Times:
    """Cycles for about so many seconds, or exactly so many, after `warm_up` calls of each side."""
    visits: dict[str, list[list[tuple[float, ...]]]] = {side.name: [] for side in sides}
    first = {
        side.name: sum(visit(replace(side, uncounted=0, counted=warm_up))[0]) for side in sides
    }
    start = time.perf_counter()
    for cycle in range(MOST_CYCLES if cycles is None else cycles):
        late = time.perf_counter() - start > seconds
        if cycles is None and cycle >= FEWEST_CYCLES and late:
            break
        for side in sides:
            visits[side.name].append(visit(side))
    moved = {side.name: dict(zip(side.steps, side.moved, strict=True)) for side in sides}
    return Times(visits, moved, first)


def joined(repeats: Sequence[Times]) -> Times:
    """Several repeats as one run: all calls of a repeat are one cycle, whatever visits made it."""
    visits = {
        name: [[call for visit in times.visits[name] for call in visit] for times in repeats]
        for name in repeats[0].visits
    }
    first = {name: statistics.median(t.first[name] for t in repeats) for name in repeats[0].first}
    walls = {name: [w for t in repeats for w in t.walls[name]] for name in repeats[0].walls}
    return Times(visits, repeats[0].moved, first, walls)


def spread(visits: Sequence[Sequence[float]]) -> Spread:
    """Of the calls of all repeats."""
    values = [value for visit in visits for value in visit]
    tails = (values[0],) * 4
    if len(values) > 1:
        parts = statistics.quantiles(values, n=20, method="inclusive")
        tails = parts[0], parts[1], parts[-2], parts[-1]
    over = stats.median([statistics.median(visit) for visit in visits])
    middle = statistics.median(values)
    return Spread(middle, *tails, over.low, over.high, len(values), len(visits))


def contract(
    on_gpu: bool, *, warm_up: int, repeats: str, tokens: str, cache: str, graphs: str, baseline: str
) -> dict[str, str]:
    """How the numbers of one run were taken, for reports and captions; what it leaves open is
    said by the caller."""
    return {
        "clock": (
            "CUDA events between replays, and the host's clock between two synchronisations"
            if on_gpu
            else "wall clock; an op of a CPU is over when it returns"
        ),
        "warm_up": f"{warm_up} calls of each side dropped, the first reported apart",
        "repeats": repeats,
        "tokens": tokens,
        "cache": cache,
        "cuda_graphs": graphs,
        "baseline": baseline,
        "intervals": "95 % of the median over repeats, by order statistics; p5 and p95 of calls",
    }


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
