"""Launch: one sweep from its checked configuration to its tables and figures.

Starting, continuing, retrying and widening are one path: whatever the ledger lacks is run. The
driver is the only writer; a lock on the output directory keeps a second one out.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

from quest_dist import (
    closing,
    estimate,
    lossless,
    ordering,
    overview,
    reported,
    schedule,
    stats,
    table,
)
from quest_dist.cluster import Workers, device_of
from quest_dist.follow import Follower
from quest_dist.ledger import Ledger, Ran, lock
from quest_dist.parts import combined
from quest_dist.plan import Unit
from quest_dist.prepare import Sweep, prepare
from quest_dist.progress import Progress
from quest_dist.provenance import Provenance
from quest_dist.report import files as results
from quest_dist.report import verdicts
from quest_dist.report.launched import texts as launched_texts
from quest_dist.work import EMPTY, Work, nothing_done
from quest_dist.worker import failed

if TYPE_CHECKING:
    from quest_dist.tracker import Tracker

FINISHED, INCOMPLETE = 0, 1
#: New objects between two collections of garbage. Torch, Ray and MLflow make a million that stay;
#: to go through them after every 700 is a tenth of what a small sweep's driver computes.
COLLECTED_AFTER = 50_000


def run(
    config: Mapping[str, Any],
    provenance: Provenance | None = None,
    run_unit: str = schedule.WORKER,
    out: Console | None = None,
    parts: Sequence[Mapping[str, Any]] = (),
) -> int:
    """Run (or plan) a composed configuration; return the exit status.

    `run_unit` names what workers call, as module:function; `parts` are the configurations of the
    sweeps that `config` puts together. Raises ValueError for mistakes of the user.
    """
    with _seldom_collected():
        return _launched(config, provenance, run_unit, out or closing.console(), parts)


@contextlib.contextmanager
def _seldom_collected() -> Iterator[None]:
    before = gc.get_threshold()
    gc.set_threshold(COLLECTED_AFTER, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _launched(
    config: Mapping[str, Any],
    provenance: Provenance | None,
    run_unit: str,
    out: Console,
    parts: Sequence[Mapping[str, Any]],
) -> int:
    sweep = combined(config, parts) if parts else prepare(config)
    if config["plan"]:
        return _plan(sweep, out)
    with lock(sweep.output_dir), Ledger(sweep.output_dir / "ledger.db") as ledger:
        ledger.add_points(sweep.points)
        work = Work.of(sweep.asking(ledger, EMPTY), ledger)
        _announce(sweep, ledger, work, out)
        _refuse(sweep, ledger, work)
        launched = provenance or Provenance()
        if launched.config:
            launched.save(sweep.directory / "hydra")
        made = table.Made(ledger.version)
        tracker = _tracker(sweep, ledger, launched, made) if sweep.tracking["enabled"] else None
        finished = True
        with _following(sweep, ledger, tracker, made) as changed:
            if work.all_units:
                finished = _run(sweep, ledger, changed, run_unit, out)
        return _close(sweep, ledger, tracker, launched, made, finished, out)


def _plan(sweep: Sweep, out: Console) -> int:
    path = sweep.output_dir / "ledger.db"
    with Ledger(path) if path.exists() else contextlib.nullcontext() as ledger:
        work = Work.of(sweep, ledger)
        _announce(sweep, ledger, work, out)
        estimate.show(sweep, work, ledger, out)
        estimate.searches(sweep, ledger, out)
    return FINISHED


def _announce(sweep: Sweep, ledger: Ledger | None, work: Work, out: Console) -> None:
    pairs = sum(sweep.counts.values())
    done = ledger.done if ledger is not None else nothing_done
    have = sum(len(done(p.key) & set(range(sweep.counts[p.key]))) for p in sweep.points)
    most = "at most " if any(part.search.delta for part in sweep.parts) else ""
    line = f"{sweep.name}: {len(sweep.points)} points, {most}{pairs} records"
    if have:
        line += f", {have} of them done"
    left = len(work.all_units)
    none = "nothing that is left can be begun" if work.refused else "nothing left to run"
    line += f"; {left} units left" if left else f"; {none}"
    line += f", {len(work.alone)} of them timed alone" if work.alone else ""
    out.print(f"[bold]{line}[/]")
    for refused in work.refused:
        place = refused.unit.first
        said = f"not begun: {place.task.name} on {place.model.name}: {refused.reason}"
        out.print(said, style="yellow", markup=False, soft_wrap=True)


def _refuse(sweep: Sweep, ledger: Ledger, work: Work) -> None:
    """Keep in the ledger, as failures, what is not begun; ValueError where that is everything."""
    if work.refused and not work.all_units:
        unit, reason = work.refused[0]
        raise ValueError(f"{unit.first.task.name} on {unit.first.model.name}: {reason}")
    for unit, reason in work.refused:
        ledger.add(
            failed(point, sweep.metrics[point.key], sample, f"not begun: {reason}")
            for point in unit.points
            for sample in unit.samples
        )


def _run(
    sweep: Sweep, ledger: Ledger, changed: Callable[[], None], run_unit: str, out: Console
) -> bool:
    """Run what the ledger lacks, a search rung by rung; return False when interrupted."""
    storage = sweep.directory / "tune"
    tried: dict[str, int] = {}
    try:
        with schedule.opened(sweep.cluster, storage, run_unit) as run_units:
            while True:
                now = sweep.asking(ledger, tried)
                work = Work.of(now, ledger, tried)
                if not work.units:
                    break
                if not _round(now, ledger, work, work.units, work.workers, run_units, changed, out):
                    return False
                tried = {k: n for k, n in now.counts.items() if k not in sweep.exclusive}
            # Times are taken last, when nothing else of this sweep runs.
            return not work.alone or _round(
                now, ledger, work, work.alone, work.one, run_units, changed, out
            )
    except (KeyboardInterrupt, SystemExit):  # while Ray was stopping; what it makes of SIGTERM
        return False


def _round(
    sweep: Sweep,
    ledger: Ledger,
    work: Work,
    units: Sequence[Unit],
    workers: Workers,
    run_units: schedule.RunUnits,
    changed: Callable[[], None],
    out: Console,
) -> bool:
    """Schedule units; return False when interrupted."""
    resources = f"{workers.count} x {workers.cpus} threads"
    if workers.gpus:
        resources += f" and {workers.gpus:g} GPU (cuda)"
    where = "this process" if sweep.cluster.backend == "inline" else "Ray Tune"
    described = f"{where}, {resources}; {sweep.output_dir}"
    with Progress(sweep.points, units, ledger.records, work.seconds, described, out) as progress:

        def on_report(report: schedule.Report) -> None:
            alone = any(record["point"] in sweep.exclusive for record in report["records"])
            ran = Ran(report["unit"], report["sample"], alone, **report["ran"])
            ledger.add(report["records"], ran)
            progress.report(report)
            changed()

        def on_failure(unit: Unit, message: str) -> None:
            ledger.add(
                failed(point, sweep.metrics[point.key], sample, message)
                for point in unit.points
                for sample in unit.samples
            )
            progress.failure(unit, message)
            changed()

        return run_units(units, workers, on_report, on_failure, work.seconds)


@contextlib.contextmanager
def _following(
    sweep: Sweep, ledger: Ledger, tracker: Tracker | None, made: table.Made
) -> Iterator[Callable[[], None]]:
    """Copy the table to MLflow in the background; yields what says that it changed."""
    if tracker is None:
        yield lambda: None
        return
    # Connected while workers start: a new database is seconds of computing.
    follower = Follower(
        lambda: tracker.sync(reported.rows(sweep, ledger, made)), first=tracker.connect
    )
    follower.start()
    try:
        yield follower.notify
    finally:
        follower.stop()


def _close(
    sweep: Sweep,
    ledger: Ledger,
    tracker: Tracker | None,
    provenance: Provenance,
    made: table.Made,
    finished: bool,
    out: Console,
) -> int:
    rows = reported.rows(sweep, ledger, made)
    launched = reported.launched(sweep, ledger, provenance, made)
    files = results.write(launched, sweep.directory)
    advice: list[str] = []
    for part in launched.parts:
        own = part.rows
        if len(launched.parts) > 1:
            closing.heading(part.name, part.about, out)
        if found := lossless.found(own):
            # Its points have as many samples as they needed, so their means do not compare.
            closing.results(own, out)
            closing.lossless(found, lossless.totals(own), out)
            advice += lossless.lines(own)
            continue
        everything = [*own, *overview.average(own)]
        closing.results(everything, out)
        said = [*stats.recommendation(everything), *_order(own, ledger)]
        out.print("\n".join(["", *overview.resolved(said)]), markup=False, soft_wrap=True)
        advice += said
    lines = verdicts.lines(launched)
    if verdicts.of_the_paper(lines):
        closing.verdicts(lines, out)
    look: list[str] = []
    shown = tracker is None or tracker.finish(rows, files, "\n".join(f"* {a}" for a in advice))
    if tracker is not None and shown:
        look = [tracker.command(), tracker.url()]
    closing.paths(files, look, out)
    if not shown:
        out.print("MLflow lacks some of this; the same command again adds it", style="yellow")
    closing.failures(rows, out)
    if not finished:
        out.print("interrupted; the same command again goes on from here", style="yellow")
    asked = sweep.asking(ledger, EMPTY).counts
    return FINISHED if ledger.complete(sweep.points, asked) else INCOMPLETE


def _order(rows: Sequence[table.Row], ledger: Ledger) -> list[str]:
    """Whether methods keep their order at equal budget, where an upper bound was run too."""
    if not any(row.method == "oracle_page" for row in rows):
        return []
    return ordering.statements(rows, ledger)


def _tracker(sweep: Sweep, ledger: Ledger, provenance: Provenance, made: table.Made) -> Tracker:
    from quest_dist import projection, tracker

    known = projection.Sweep(
        name=sweep.name,
        command=provenance.command,
        config=provenance.config,
        about=sweep.about,
        source=provenance.source,
        device=device_of(sweep.cluster),
    )
    return tracker.Tracker(
        sweep.tracking,
        sweep.output_dir,
        known,
        ledger,
        lambda rows: launched_texts(reported.launched(sweep, ledger, provenance, made)),
    )
