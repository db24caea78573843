"""Schedule: units onto workers, reports back to the driver; inline here, Ray Tune next door.

Invariants:
* Both backends deliver the same reports; `on_report` runs in the driver's main thread, before
  the sample counts as delivered.
* A unit whose worker broke is tried again, up to `cluster.max_failures` times, for the samples
  that it did not deliver; the sample it broke at goes last, so that it holds up no other.
* What could not be run at all is handed to `on_failure`, once.
* Every report says when and where it was made (`ran`, see ledger.Ran).
* Ray is started by the first units, once for all that are run while the place is open.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quest_dist.cluster import Cluster, Workers
from quest_dist.plan import Unit
from quest_dist.worker import Runtime, describe

Report = dict[str, Any]
OnReport = Callable[[Report], None]
OnFailure = Callable[[Unit, str], None]
RunUnit = Callable[[Mapping[str, Any], Mapping[str, Any]], Iterator[Report]]
#: What a unit takes by estimate.
Seconds = Callable[[Unit], float]
#: Runs units on workers; False when the user interrupted.
RunUnits = Callable[[Sequence[Unit], Workers, OnReport, OnFailure, Seconds], bool]
WORKER = "quest_dist.worker:run"


def samples(unit: Unit) -> float:
    """A unit's samples: its length where nobody says better."""
    return float(len(unit.samples))


@dataclass
class Round:
    """One pass over the units that are left: what was delivered and what broke.

    `broken` maps a unit's key to (message, whether another try can help).
    """

    units: Sequence[Unit]
    on_report: OnReport
    seconds: Seconds = samples
    delivered: dict[str, set[int]] = field(default_factory=dict)
    broken: dict[str, tuple[str, bool]] = field(default_factory=dict)
    interrupted: bool = False
    error: Exception | None = None

    def deliver(self, report: Report) -> None:
        """Hand a report to the driver; an error there ends the round and is raised after it."""
        if self.error is not None:
            return
        try:
            self.on_report(report)
        except Exception as error:
            self.error = error
            return
        self.delivered.setdefault(report["unit"], set()).add(report["sample"])

    def left(self) -> Iterator[tuple[Unit, str, bool]]:
        """Yield what of each unit was not delivered, why, and whether to try it again."""
        for unit in self.units:
            done = self.delivered.get(unit.key, set())
            samples = [sample for sample in unit.samples if sample not in done]
            if samples:
                message, again = self.broken.get(unit.key, ("", True))
                rotated = (*samples[1:], samples[0]) if message else tuple(samples)
                yield Unit(unit.points, rotated), message, again


@contextlib.contextmanager
def opened(cluster: Cluster, storage: Path, run_unit: str = WORKER) -> Iterator[RunUnits]:
    """Yield what runs units, as often as it is asked to.

    `storage` is a folder for Ray Tune's own files, which nothing reads again. What is yielded
    raises ValueError when the cluster can never satisfy a worker, and whatever `on_report` raised.
    """
    with contextlib.ExitStack() as stack:
        tuned: list[Callable[[Round, Workers], None]] = []

        def run(
            units: Sequence[Unit],
            workers: Workers,
            on_report: OnReport,
            on_failure: OnFailure,
            seconds: Seconds = samples,
        ) -> bool:
            if cluster.backend == "inline":
                inline = Inline(workers, run_unit)
                return _rounds(units, cluster, on_report, on_failure, seconds, inline)
            from quest_dist.schedule_ray import Tuned

            try:
                if not tuned:
                    started = Tuned(cluster, storage, run_unit, workers.count * workers.cpus)
                    tuned.append(stack.enter_context(started))
                return _rounds(
                    units, cluster, on_report, on_failure, seconds, lambda r: tuned[0](r, workers)
                )
            except KeyboardInterrupt:  # while Ray was starting
                return False

        yield run


def _rounds(
    units: Sequence[Unit],
    cluster: Cluster,
    on_report: OnReport,
    on_failure: OnFailure,
    seconds: Seconds,
    backend: Callable[[Round], None],
) -> bool:
    for attempt in range(cluster.max_failures + 1):
        current = Round(units, on_report, seconds)
        backend(current)
        if current.error is not None:
            raise current.error
        if current.interrupted:
            return False
        last = attempt == cluster.max_failures
        again = []
        for unit, message, retry in current.left():
            if retry and not last:
                again.append(unit)
            else:
                rest = Unit(unit.points, tuple(sorted(unit.samples)))
                on_failure(rest, message or "the worker ended without a result")
        units = again
        if not units:
            break
    return True


@dataclass(frozen=True)
class Inline:
    """Run a round in this process, one unit after the other."""

    workers: Workers
    run_unit: str

    def __call__(self, current: Round) -> None:
        """Run the round's units, in order."""
        runtime = Runtime(self.workers.cpus, self.workers.gpus)
        evaluate = resolve(self.run_unit)
        try:
            for unit in current.units:
                self._unit(evaluate, unit, runtime, current)
        except KeyboardInterrupt:
            current.interrupted = True

    @staticmethod
    def _unit(evaluate: RunUnit, unit: Unit, runtime: Runtime, current: Round) -> None:
        try:
            for report in witnessed(evaluate, unit.to_dict(), runtime.to_dict()):
                current.deliver(report)
                if current.error is not None:
                    return
        except Exception as error:
            current.broken[unit.key] = (describe(error), can_retry(error))


def resolve(path: str) -> RunUnit:
    """Return the function that 'module:function' names."""
    module, _, name = path.partition(":")
    found: RunUnit = getattr(importlib.import_module(module), name)
    return found


def witnessed(
    run_unit: RunUnit, unit: Mapping[str, Any], runtime: Mapping[str, Any]
) -> Iterator[Report]:
    """Yield a unit's reports, each with when and where it was made."""
    reports = run_unit(unit, runtime)
    while True:
        started = time.time()
        report = next(reports, None)
        if report is None:
            return
        gpus = f"cuda {os.environ.get('CUDA_VISIBLE_DEVICES', '')}".strip()
        ran = {
            "host": socket.gethostname(),
            "device": gpus if runtime["gpus"] else "cpu",
            "process": os.getpid(),
            "started": started,
            "ended": time.time(),
        }
        yield {**report, "ran": ran}


def can_retry(error: Exception) -> bool:
    """Whether running the same unit again could end otherwise; wrong input never does."""
    return not isinstance(error, ValueError | TypeError | ImportError | FileNotFoundError)


def by_model(units: Iterable[Unit]) -> dict[str, int]:
    """Number the distinct models of the units, in order of appearance."""
    numbers: dict[str, int] = {}
    for unit in units:
        numbers.setdefault(unit.first.model.canonical(), len(numbers))
    return numbers
