"""A discrete simulation of one sweep on many workers, sample by sample.

What it has of the real scheduler (schedule.py, schedule_ray.py): a free worker takes the first unit
left of the model that it has loaded, else the first one left of any, for which it starts anew and
loads; a worker waits while the driver takes its report, and the driver does one thing at a time; a
worker that breaks loses the sample it was at, and what it had not delivered is run in the next
round, which begins when this one has ended.

Invariants: equal arguments give equal outcomes; every sample is evaluated once, but for those lost.
Seconds throughout.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Job:
    """A unit: its model, the seconds to start a worker with it, and those of each sample."""

    model: str
    load: float
    samples: tuple[float, ...]


@dataclass(frozen=True)
class Driver:
    """What the driver is busy with a unit that begins, and with a report."""

    unit: float = 0.0
    report: float = 0.0


@dataclass
class Outcome:
    """What came of it: when the last sample ended, the seconds evaluated and those lost to broken
    workers, models loaded, workers broken, rounds begun, the driver's busy seconds, and the samples
    that were given up."""

    makespan: float = 0.0
    evaluated: float = 0.0
    lost: float = 0.0
    loads: int = 0
    broken: int = 0
    rounds: int = 0
    driver: float = 0.0
    given_up: int = 0


@dataclass
class _Worker:
    model: str = ""
    samples: deque[float] = field(default_factory=deque)
    load: float = 0.0


def simulate(
    jobs: Sequence[Job],
    workers: int,
    driver: Driver = Driver(),
    breaks_per_hour: float = 0.0,
    rounds: int = 3,
    seed: int = 0,
) -> Outcome:
    """Run the jobs, in their order, on so many workers, each of which breaks at that rate."""
    outcome, chance = Outcome(), random.Random(seed)
    for _ in range(rounds):
        if not jobs:
            break
        outcome.rounds += 1
        jobs = _round(jobs, workers, driver, breaks_per_hour / 3600, chance, outcome)
    outcome.given_up = sum(len(job.samples) for job in jobs)
    return outcome


def shortest(jobs: Sequence[Job], workers: int) -> float:
    """A time that no schedule can be faster than, however the samples are cut into units: one
    start, then every worker busy to the end, or the longest sample."""
    each = [seconds for job in jobs for seconds in job.samples]
    return min(job.load for job in jobs) + max(sum(each) / workers, *each)


def _round(
    jobs: Sequence[Job],
    workers: int,
    driver: Driver,
    rate: float,
    chance: random.Random,
    outcome: Outcome,
) -> list[Job]:
    """Run jobs until none is left; return what broken workers did not deliver."""
    waiting: dict[str, deque[tuple[int, Job]]] = {}
    for number, job in enumerate(jobs):
        waiting.setdefault(job.model, deque()).append((number, job))
    begin = outcome.makespan
    crew = [_Worker() for _ in range(workers)]
    events = [(begin, number) for number in range(workers)]  # a worker can go on at this time
    driver_free = begin
    left: list[Job] = []
    while events:
        now, number = heapq.heappop(events)
        worker = crew[number]
        served, busy, setup = max(now, driver_free), 0.0, 0.0
        if worker.samples:  # one has ended, and is reported
            outcome.evaluated += worker.samples.popleft()
            outcome.makespan = max(outcome.makespan, served + driver.report)
            busy = driver.report
        if not worker.samples:
            taken = _next(waiting, worker.model)
            if taken is None:
                driver_free = max(driver_free, served + busy)
                outcome.driver += busy
                continue
            busy += driver.unit
            if taken.model != worker.model:
                setup = taken.load
                outcome.loads += 1
            worker.model, worker.load = taken.model, taken.load
            worker.samples = deque(taken.samples)
        driver_free = served + busy
        outcome.driver += busy
        takes = setup + worker.samples[0]
        until_broken = chance.expovariate(rate) if rate else takes
        if until_broken < takes:
            outcome.broken += 1
            outcome.lost += max(0.0, until_broken - setup)
            worker.samples.rotate(-1)  # what it broke at goes last
            left.append(Job(worker.model, worker.load, tuple(worker.samples)))
            outcome.makespan = max(outcome.makespan, driver_free + until_broken)
            crew[number] = _Worker()
            takes = until_broken
        heapq.heappush(events, (driver_free + takes, number))
    return left


def _next(waiting: dict[str, deque[tuple[int, Job]]], model: str) -> Job | None:
    """Take the first job of a model, else the first of any; None when none is left."""
    own = waiting.get(model)
    queue = own or min((q for q in waiting.values() if q), key=lambda q: q[0][0], default=None)
    return queue.popleft()[1] if queue else None
