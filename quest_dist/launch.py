"""Launch: one sweep from its checked configuration to its tables and figures.

Starting, continuing, retrying and widening are one path: whatever the ledger lacks is run. The
driver is the only writer; a lock on the output directory keeps a second one out.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from quest_dist import (
    closing,
    estimate,
    figures,
    lossless,
    matched,
    overview,
    schedule,
    stats,
    table,
)
from quest_dist.cluster import Workers, device_of
from quest_dist.follow import Follower
from quest_dist.ledger import Ledger, lock
from quest_dist.parts import combined
from quest_dist.plan import Unit
from quest_dist.prepare import Sweep, prepare
from quest_dist.progress import Progress
from quest_dist.provenance import Provenance
from quest_dist.work import EMPTY, Work, nothing_done
from quest_dist.worker import failed

if TYPE_CHECKING:
    from quest_dist.tracker import Tracker

FINISHED, INCOMPLETE = 0, 1


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
    out = out or closing.console()
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
        tracker = _tracker(sweep, ledger, launched) if sweep.tracking["enabled"] else None
        finished = True
        with _following(sweep, ledger, tracker) as changed:
            if work.all_units:
                finished = _run(sweep, ledger, changed, run_unit, out)
        return _close(sweep, ledger, tracker, launched, finished, out)


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
    line += f"; {left} units left" if left else "; nothing left to run"
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
    except KeyboardInterrupt:  # while Ray was stopping
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
            ledger.add(report["records"])
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

        return run_units(units, workers, on_report, on_failure)


@contextlib.contextmanager
def _following(
    sweep: Sweep, ledger: Ledger, tracker: Tracker | None
) -> Iterator[Callable[[], None]]:
    """Copy the table to MLflow in the background; yields what says that it changed."""
    if tracker is None:
        yield lambda: None
        return
    follower = Follower(lambda: tracker.sync(_rows(sweep, ledger)))
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
    finished: bool,
    out: Console,
) -> int:
    rows = _rows(sweep, ledger)
    by_part = _by_part(sweep, ledger)
    files = _files(sweep, rows, by_part, provenance)
    advice: list[str] = []
    for part, own in zip(sweep.parts, by_part, strict=True):
        if len(by_part) > 1:
            closing.heading(part.name, part.about, out)
        if found := lossless.found(own):
            # Its points have as many samples as they needed, so their means do not compare.
            closing.results(own, out)
            closing.lossless(found, lossless.totals(own), out)
            advice += lossless.lines(own)
            continue
        everything = [*own, *overview.average(own)]
        closing.results(everything, out)
        said = stats.recommendation(everything)
        out.print("\n".join(["", *overview.resolved(said)]), markup=False, soft_wrap=True)
        advice += said
    look: list[str] = []
    if tracker is not None and tracker.finish(rows, files, "\n".join(f"* {a}" for a in advice)):
        look = [tracker.command(), tracker.url()]
    closing.paths(files, look, out)
    closing.failures(rows, out)
    if not finished:
        out.print("interrupted; the same command again goes on from here", style="yellow")
    asked = sweep.asking(ledger, EMPTY).counts
    return FINISHED if ledger.complete(sweep.points, asked) else INCOMPLETE


def _files(
    sweep: Sweep,
    rows: Sequence[table.Row],
    by_part: Sequence[Sequence[table.Row]],
    provenance: Provenance,
) -> list[Path]:
    """Write the table and draw the figures of each part from its own rows; a date in a picture is
    that of the newest record."""
    from quest_dist.figures.caption import Caption

    sweep.directory.mkdir(parents=True, exist_ok=True)
    listing = sweep.directory / "points.csv"
    listing.write_text(table.to_csv(rows), encoding="utf-8")
    listings = [listing]
    if found := [finding for own in by_part for finding in lossless.found(own)]:
        listings.append(sweep.directory / "lossless.csv")
        listings[-1].write_text(lossless.to_csv(found), encoding="utf-8")
    newest = max((r.finished_at for r in rows if r.n), default=time.time())
    caption = Caption(
        hardware=provenance.hardware,
        commit=provenance.source.get("commit", "")[:12],
        date=time.strftime("%Y-%m-%d", time.gmtime(newest)),
        command=provenance.command,
    )
    drawn = [
        figures.draw(name, own, sweep.directory, caption)
        for part, own in zip(sweep.parts, by_part, strict=True)
        for name in part.figures
    ]
    return [*listings, *(path for paths in drawn for path in paths)]


def _rows(sweep: Sweep, ledger: Ledger) -> list[table.Row]:
    """The table of all points, with what searches found."""
    rows = table.rows(sweep.points, ledger, sweep.asking(ledger, EMPTY).counts)
    for part in sweep.parts:
        rows = matched.told(part.search, part.points, part.counts, sweep.exclusive, ledger, rows)
    return rows


def _by_part(sweep: Sweep, ledger: Ledger) -> list[list[table.Row]]:
    """The table of each part's points, with what its own search found."""
    asking = sweep.asking(ledger, EMPTY).parts
    return [
        matched.told(
            part.search,
            part.points,
            part.counts,
            sweep.exclusive,
            ledger,
            table.rows(part.points, ledger, now.counts),
        )
        for part, now in zip(sweep.parts, asking, strict=True)
    ]


def _tracker(sweep: Sweep, ledger: Ledger, provenance: Provenance) -> Tracker:
    from quest_dist import projection, tracker

    known = projection.Sweep(
        name=sweep.name,
        command=provenance.command,
        config=provenance.config,
        about=sweep.about,
        source=provenance.source,
        device=device_of(sweep.cluster),
    )
    return tracker.Tracker(sweep.tracking, sweep.output_dir, known, ledger)
