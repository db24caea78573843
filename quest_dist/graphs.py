"""Graphs: timing where calls are launched, and one takes less than the launching of it.

A *pass* makes so many calls of a side in a row, each on the next buffer of its rotation; it is
recorded once as a CUDA graph and replayed between two events. A side of several steps is recorded
for each number of its first steps, and a step's time is the difference that it makes: parts add up
to the whole exactly, and a short part may come out below zero. Every call's time is a pass's share.

The first replay of a visit is not counted: it keeps the device busy while the others are queued.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from quest_dist.timing import WARM_UP, Side, Times, measure

#: Calls of a pass at least, so that what is between two replays does not count.
LEAST_CALLS = 32

Pass = Callable[[], None]
#: The microseconds of so many passes, one after the other.
Clocked = Callable[[int], list[float]]
Record = Callable[[Pass], Clocked]


def measure_passes(
    sides: Sequence[Side],
    seconds: float,
    record: Record,
    *,
    warm_up: int = WARM_UP["cuda"],
    cycles: int | None = None,
) -> Times:
    """`timing.measure` of passes that `record` makes ready; `warm_up` of each are dropped."""
    walls: dict[str, list[float]] = {side.name: [] for side in sides}
    recorded = {
        side.name: [record(one_pass(side, first)) for first in range(1, len(side.steps) + 1)]
        for side in sides
    }

    def visit(side: Side) -> list[tuple[float, ...]]:
        calls = calls_of(side)
        prefixes = [[us / calls for us in clocked(side.counted)] for clocked in recorded[side.name]]
        walls[side.name].append(getattr(recorded[side.name][-1], "wall", math.nan) / calls)
        return [
            tuple(after - before for before, after in itertools.pairwise((0.0, *ends)))
            for ends in zip(*prefixes, strict=True)
        ]

    times = measure(sides, seconds, visit, warm_up=warm_up, cycles=cycles)
    return replace(times, walls={name: found[1:] for name, found in walls.items()})


def calls_of(side: Side) -> int:
    """Calls of a pass: every buffer as often."""
    buffers = side.rotation.buffers
    return buffers * math.ceil(LEAST_CALLS / buffers)


def one_pass(side: Side, first: int) -> Pass:
    """The calls of a pass, of the first so many steps each."""
    steps = list(side.steps.values())[:first]

    def run() -> None:
        for _ in range(calls_of(side)):
            buffer = side.rotation.next()
            for step in steps:
                step(buffer)

    return run


def graph(run: Pass) -> Clocked:
    """Records a pass as a CUDA graph on the current device."""
    beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        run()  # what is loaded or allocated once
    torch.cuda.current_stream().wait_stream(beside)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        run()

    return Launched(recorded.replay)


class Launched:
    """Times a pass that is only launched, by events of the current stream; `wall` is the host's
    time of the last passes, each, from one synchronisation to the other."""

    def __init__(self, run: Pass) -> None:
        self.run, self.wall = run, math.nan

    def __call__(self, passes: int) -> list[float]:
        """The microseconds of so many passes, after one that is not counted."""
        kind = torch.cuda.Event
        events = [kind(enable_timing=True) for _ in range(passes + 1)]  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        start = time.perf_counter_ns()
        for event in events:
            self.run()
            event.record()
        torch.cuda.synchronize()
        self.wall = (time.perf_counter_ns() - start) / 1000 / len(events)
        return [1000 * start.elapsed_time(end) for start, end in itertools.pairwise(events)]


def direct(run: Pass) -> Clocked:
    """Times a pass where a call is over when it returns."""

    def clocked(passes: int) -> list[float]:
        run()
        marks = [time.perf_counter_ns()]
        for _ in range(passes):
            run()
            marks.append(time.perf_counter_ns())
        return [(end - start) / 1000 for start, end in itertools.pairwise(marks)]

    return clocked
