"""Launch: one sweep from its checked configuration to its tables and figures.

Starting, continuing, retrying and widening are one path: whatever the ledger lacks is run. The
driver is the only writer; a lock on the output directory keeps a second one out.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console

from quest_dist import closing, cost, figures, schedule, stats, table
from quest_dist.cluster import Workers, fit
from quest_dist.follow import Follower
from quest_dist.ledger import Ledger, lock
from quest_dist.plan import Point, Unit, units
from quest_dist.prepare import Sweep, prepare
from quest_dist.progress import Progress, clock
from quest_dist.worker import failed

FINISHED, INCOMPLETE = 0, 1
#: Units are cut to at least so many seconds, so that starting a worker is worth it.
UNIT_SECONDS = 30.0
#: Units a worker should get, so that the last ones end together.
UNITS_PER_WORKER = 4
SLICE_SECONDS = 900.0  # and never much longer than this, so that a lost worker loses little


def run(
    config: Mapping[str, Any], run_unit: str = schedule.WORKER, out: Console | None = None
) -> int:
    """Run (or plan) a composed configuration; return the exit status.

    `run_unit` names what workers call, as module:function. Raises ValueError for mistakes of the
    user.
    """
    out = out or closing.console()
    sweep = prepare(config)
    if config["plan"]:
        return _plan(sweep, out)
    with lock(sweep.output_dir), Ledger(sweep.output_dir / "ledger.db") as ledger:
        ledger.add_points(sweep.points)
        work = Work.of(sweep, ledger)
        _announce(sweep, ledger, work, out)
        finished = True
        with _following(sweep, ledger, out) as follower:
            if work.units:
                finished = _run(sweep, ledger, work, follower, run_unit, out)
            follower.notify()
        return _close(sweep, ledger, finished, out)


class Work:
    """What is left to do, cut into units for the workers there are."""

    def __init__(self, found: Sequence[Unit], workers: Workers, seconds: Callable[[Unit], float]) -> None:
        self.units, self.workers, self.seconds = found, workers, seconds

    @classmethod
    def of(cls, sweep: Sweep, ledger: Ledger | None) -> Work:
        """Cut what `ledger` lacks of a sweep (None: everything)."""
        done = ledger.done if ledger is not None else _nothing
        pace = ledger.pace if ledger is not None else _no_pace
        whole = units(sweep.points, sweep.counts, done, lambda row: 10**9)
        workers = fit(sweep.cluster, max((cost.worker_bytes(u.points) for u in whole), default=1))
        gpu = workers.gpus > 0

        def seconds(unit: Unit) -> float:
            return cost.unit_seconds(unit, workers.cpus, gpu, pace)

        target = sum(map(seconds, whole)) / (workers.count * UNITS_PER_WORKER)
        target = min(max(target, UNIT_SECONDS), SLICE_SECONDS)

        def size(row: tuple[Point, ...]) -> int:
            if sweep.cluster.samples_per_unit is not None:
                return sweep.cluster.samples_per_unit
            return round(target / cost.sample_seconds(row, workers.cpus, gpu, pace)) or 1

        found = units(sweep.points, sweep.counts, done, size, seconds)
        count = max(1, min(workers.count, len(found)))
        if sweep.cluster.cpus_per_worker is None and sweep.cluster.address is None:
            # Fewer units than workers: the threads of the idle ones go to the others.
            workers = Workers(count, workers.cpus * workers.count // count, workers.gpus)
        else:
            workers = Workers(count, workers.cpus, workers.gpus)
        return cls(found, workers, seconds)

    def wall(self) -> float:
        """Return the estimated seconds until the last unit ends, loading of models left out."""
        ends = [0.0] * self.workers.count
        for unit in self.units:
            ends[ends.index(min(ends))] += self.seconds(unit)
        return max(ends)


def _plan(sweep: Sweep, out: Console) -> int:
    path = sweep.output_dir / "ledger.db"
    with Ledger(path) if path.exists() else contextlib.nullcontext() as ledger:
        work = Work.of(sweep, ledger)
        _announce(sweep, ledger, work, out)
        closing.plan(sweep.points, sweep.counts, ledger.done if ledger else _nothing, out)
        memory = max((cost.worker_bytes(unit.points) for unit in work.units), default=0)
        measured = ledger is not None and any(
            ledger.pace(u.first.model.name, u.first.task.name) for u in work.units
        )
        basis = "from the ledger's own measurements" if measured else "a rough guess before any run"
        out.print(
            f"about {clock(work.wall())} and {memory / 2**30:.1f} GiB a worker ({basis});"
            " nothing was run",
            markup=False,
        )
    return FINISHED


def _announce(sweep: Sweep, ledger: Ledger | None, work: Work, out: Console) -> None:
    pairs = sum(sweep.counts.values())
    done = ledger.done if ledger is not None else _nothing
    have = sum(len(done(p.key) & set(range(sweep.counts[p.key]))) for p in sweep.points)
    line = f"{sweep.name}: {len(sweep.points)} points, {pairs} records"
    if have:
        line += f", {have} of them done"
    line += f"; {len(work.units)} units left" if work.units else "; nothing left to run"
    out.print(f"[bold]{line}[/]")


def _run(
    sweep: Sweep, ledger: Ledger, work: Work, follower: Follower, run_unit: str, out: Console
) -> bool:
    """Schedule the units; return False when interrupted."""
    workers = work.workers
    resources = f"{workers.count} x {workers.cpus} threads"
    if workers.gpus:
        resources += f" and {workers.gpus:g} GPU"
    where = "this process" if sweep.cluster.backend == "inline" else "Ray Tune"
    described = f"{where}, {resources}; {sweep.output_dir}"
    with Progress(sweep.points, work.units, ledger.records, work.seconds, described, out) as progress:

        def on_report(report: schedule.Report) -> None:
            ledger.add(report["records"])
            progress.report(report)
            follower.notify()

        def on_failure(unit: Unit, message: str) -> None:
            ledger.add(
                failed(point, sweep.metrics[point.key], sample, message)
                for point in unit.points
                for sample in unit.samples
            )
            progress.failure(unit, message)
            follower.notify()

        storage = sweep.directory / "tune"
        return schedule.run(
            work.units, workers, sweep.cluster, on_report, on_failure, storage, run_unit
        )


@contextlib.contextmanager
def _following(sweep: Sweep, ledger: Ledger, out: Console) -> Iterator[Follower]:
    """A follower that copies the table to MLflow; it copies nothing where tracking is off."""

    def warn(text: str) -> None:
        sys.stderr.write(f"warning: {text}\n")

    def copy() -> None:
        if sweep.tracking["enabled"]:
            _tracker(sweep, ledger).sync(_rows(sweep, ledger))

    follower = Follower(copy, warn)
    follower.start()
    try:
        yield follower
    finally:
        follower.finish()


def _close(sweep: Sweep, ledger: Ledger, finished: bool, out: Console) -> int:
    rows = _rows(sweep, ledger)
    sweep.directory.mkdir(parents=True, exist_ok=True)
    listing = sweep.directory / "points.csv"
    listing.write_text(table.to_csv(rows), encoding="utf-8")
    files = [listing]
    for name in sweep.figures:
        files += figures.draw(name, rows, sweep.directory)
    closing.results(rows, out)
    for line in stats.recommendation(rows):
        out.print(line, markup=False)
    closing.paths(files, None, out)
    closing.failures(rows, out)
    if not finished:
        out.print("interrupted; the same command again goes on from here", style="yellow")
    return FINISHED if ledger.complete(sweep.points, sweep.counts) else INCOMPLETE


def _rows(sweep: Sweep, ledger: Ledger) -> list[table.Row]:
    return table.rows(sweep.points, ledger, sweep.counts)


def _tracker(sweep: Sweep, ledger: Ledger) -> Any:
    from quest_dist import tracker

    return tracker.Tracker(sweep.tracking, ledger, sweep)


def _nothing(key: str) -> set[int]:
    return set()


def _no_pace(model: str, task: str) -> tuple[float, float] | None:
    return None
