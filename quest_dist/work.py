"""Work: what a sweep still lacks, cut into units for the workers that there are."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from quest_dist import cost
from quest_dist.cluster import Cluster, Workers, fit, worker_memory
from quest_dist.ledger import Ledger
from quest_dist.plan import Point, Unit, units
from quest_dist.prepare import Sweep

#: Units are cut to at least so many seconds, so that starting a worker is worth it.
UNIT_SECONDS = 30.0
#: Units a worker should get, so that the last ones end together.
UNITS_PER_WORKER = 8
EMPTY: Mapping[str, int] = {}
SLICE_SECONDS = 900.0  # and never much longer than this, so that a lost worker loses little


class Refused(NamedTuple):
    """A unit that is not begun, and why."""

    unit: Unit
    reason: str


class Work:
    """What is left to do: `units` that run side by side on `workers`, then `alone`, whose units run
    one after the other on `one`, with the machine to themselves; on a cluster with one worker's
    CPUs and whole GPUs, and nothing else of this sweep anywhere. `refused` fit no worker here and
    are not begun."""

    def __init__(
        self,
        found: Sequence[Unit],
        alone: Sequence[Unit],
        workers: Workers,
        one: Workers,
        refused: Sequence[Refused],
        seconds: Callable[[Unit], float],
    ) -> None:
        self.units, self.alone, self.refused = found, alone, refused
        self.workers, self.one, self.seconds = workers, one, seconds

    @classmethod
    def of(cls, sweep: Sweep, ledger: Ledger | None, tried: Mapping[str, int] = EMPTY) -> Work:
        """Cut what `ledger` lacks of a sweep (None: everything); of the first samples that were
        `tried` of a point, by its key, nothing is tried again."""

        def done(key: str) -> set[int]:
            found = ledger.done(key) if ledger is not None else nothing_done(key)
            return found | set(range(tried.get(key, 0)))

        # Asked once for each unit, and it reads all records of a model and task.
        pace = functools.cache(ledger.pace if ledger is not None else no_pace)
        timed = [point for point in sweep.points if point.key in sweep.exclusive]
        beside = [point for point in sweep.points if point.key not in sweep.exclusive]
        whole, refused = _fitting(
            units(beside, sweep.counts, done, lambda row: 10**9), sweep.cluster
        )
        beside = list({point.key: point for unit in whole for point in unit.points}.values())
        workers = fit(sweep.cluster, max((cost.worker_bytes(u.points) for u in whole), default=1))
        gpu = workers.gpus > 0
        # Times share their GPU with nobody, whatever share of one a worker has.
        whole_gpus = float(math.ceil(workers.gpus)) if gpu else sweep.cluster.gpus_per_worker
        one = fit(replace(sweep.cluster, workers=1, gpus_per_worker=whole_gpus), 1)

        def seconds(unit: Unit) -> float:
            cpus = (one if unit.first.key in sweep.exclusive else workers).cpus
            return cost.unit_seconds(unit, cpus, gpu, pace)

        target = sum(map(seconds, whole)) / (workers.count * UNITS_PER_WORKER)
        target = min(max(target, UNIT_SECONDS), SLICE_SECONDS)

        def size(row: tuple[Point, ...]) -> int:
            if sweep.cluster.samples_per_unit is not None:
                return sweep.cluster.samples_per_unit
            return round(target / cost.sample_seconds(row, workers.cpus, gpu, pace)) or 1

        found = in_turn(units(beside, sweep.counts, done, size, seconds), seconds, workers.count)
        alone, too_large = _fitting(
            units(timed, sweep.counts, done, lambda row: 10**9, seconds), sweep.cluster
        )
        count = max(1, min(workers.count, len(found)))
        if sweep.cluster.cpus_per_worker is None and sweep.cluster.address is None:
            # Fewer units than workers: the threads of the idle ones go to the others.
            workers = Workers(count, workers.cpus * workers.count // count, workers.gpus)
        else:
            workers = Workers(count, workers.cpus, workers.gpus)
        return cls(found, alone, workers, one, [*refused, *too_large], seconds)

    @property
    def all_units(self) -> list[Unit]:
        """Both kinds, in the order in which they run."""
        return [*self.units, *self.alone]

    def wall(self) -> float:
        """Return the estimated seconds until the last unit ends, loading of models left out."""
        ends = [0.0] * self.workers.count
        for unit in self.units:
            ends[ends.index(min(ends))] += self.seconds(unit)
        return max(ends) + sum(map(self.seconds, self.alone))


def in_turn(found: Sequence[Unit], seconds: Callable[[Unit], float], workers: int) -> list[Unit]:
    """Units, longest first, in the order in which they should begin.

    A worker keeps to the model that it has loaded as long as units of it are left. So several
    workers get the models in turn, each in proportion to its work, and end together without
    loading another; a single one gets model after model.
    """
    by_model: dict[str, list[Unit]] = {}
    for unit in found:
        by_model.setdefault(unit.first.model.canonical(), []).append(unit)
    if workers == 1:
        return [unit for own in by_model.values() for unit in own]
    turns: list[tuple[float, Unit]] = []
    for own in by_model.values():
        total, begun = sum(map(seconds, own)), 0.0
        for unit in own:
            turns.append((begun / total, unit))
            begun += seconds(unit)
    return [unit for _, unit in sorted(turns, key=lambda turn: turn[0])]


def _fitting(found: Sequence[Unit], cluster: Cluster) -> tuple[list[Unit], list[Refused]]:
    """The units that a worker here can hold by estimate, and those that none can. Of a model that
    states no shape nothing is known."""
    room = worker_memory(cluster) if cluster.check_memory else None
    if room is None:
        return list(found), []
    fitting, refused = [], []
    has = "the largest of cluster.node_types has" if cluster.node_types else "there are"
    for unit in found:
        need = cost.needs(unit)
        if need <= room:
            fitting.append(unit)
            continue
        reason = (
            f"needs {need / 2**30:.1f} GiB a worker by estimate, {has} {room / 2**30:.1f};"
            " cluster.check_memory=false tries it all the same"
        )
        refused.append(Refused(unit, reason))
    return fitting, refused


def nothing_done(key: str) -> set[int]:
    """Return the finished samples of a point where there is no ledger."""
    return set()


def no_pace(model: str, task: str) -> tuple[float, float] | None:
    """Return the measured pace where there is no ledger."""
    return None
