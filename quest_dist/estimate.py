"""Estimate: what `plan=true` says: what would run, how long it takes, and what it needs.

A line is a task on a model. Time is a worker's, summed over units; where workers have GPUs it is
also GPU time, their share of one each. Everything here is a guess, and says what it is based on.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from quest_dist import cost, matched
from quest_dist.ledger import Ledger
from quest_dist.plan import Point, Unit
from quest_dist.prepare import Part, Sweep
from quest_dist.progress import clock
from quest_dist.work import EMPTY, Work, nothing_done

Place = tuple[str, str]


def show(sweep: Sweep, work: Work, ledger: Ledger | None, out: Console) -> None:
    """Print a table a part, then the whole: wall time, GPU hours, memory, and the basis of it."""
    for part in sweep.parts:
        out.print(_table(part, work, ledger, len(sweep.parts) > 1))
        methods = ", ".join(dict.fromkeys(point.method.name for point in part.points))
        out.print(f"methods: {methods}", markup=False)
    units = work.all_units
    if work.refused and not units:
        out.print("no worker here can hold what is left, so it has no estimate; nothing was run")
        return
    memory = max((cost.worker_bytes(unit.points) for unit in units), default=0)
    measured = ledger is not None and any(
        ledger.pace(unit.first.model.name, unit.first.task.name) for unit in units
    )
    basis = "from the ledger's own measurements" if measured else "a rough guess before any run"
    wall = f"about {clock(work.wall())} on {work.workers.count} workers"
    if work.workers.gpus:
        wall += f", {_gpu_hours(work, units):.1f} GPU hours"
    out.print(
        f"{wall}, and {memory / 2**30:.1f} GiB a worker ({basis}); nothing was run", markup=False
    )


def searches(sweep: Sweep, ledger: Ledger | None, out: Console) -> None:
    """Print what the searches among the parts may take, and what they cannot find; or nothing."""
    first = sweep.asking(ledger or matched.NOTHING, EMPTY)
    lines = []
    for part, now in zip(sweep.parts, first.parts, strict=True):
        search = part.search
        if search.delta is None:
            continue
        least, most = sum(now.counts.values()), sum(part.counts.values())
        lines.append(
            f"{part.name}: budgets that lose less than {search.delta:g} points, confidence"
            f" {search.confidence:g}; {least} evaluations if the next rung decides all, {most}"
            " (the grid) if none is decided"
        )
        fewest = min(n for key, n in part.counts.items() if key not in sweep.exclusive)
        if fewest < search.equal_pairs:
            lines.append(
                f"{part.name}: with {fewest} samples nothing can be called lossless: it takes"
                f" {search.equal_pairs} pairs at least, all equal; raise the tasks' samples, or"
                " search.delta"
            )
    if lines:
        wall = clock(Work.of(first, ledger).wall())
        lines.append(f"the next rung alone: about {wall}")
        out.print("\n".join(lines), markup=False, soft_wrap=True)


def _table(part: Part, work: Work, ledger: Ledger | None, titled: bool) -> Table:
    done = ledger.done if ledger is not None else nothing_done
    places: dict[Place, list[Point]] = {}
    for point in part.points:
        places.setdefault((point.task.name, point.model.name), []).append(point)
    own = {point.key for point in part.points}
    units: dict[Place, list[Unit]] = {}
    for unit in work.all_units:
        if own & {point.key for point in unit.points}:
            place = unit.first.task.name, unit.first.model.name
            units.setdefault(place, []).append(unit)
    title = f"{part.name}: {part.about}" if titled else None
    columns = ("task", "model", "points", "methods", "budgets", "samples", "done", "time")
    gpu = work.workers.gpus > 0
    listing = Table(
        *columns, *(["GPU hours"] if gpu else []), "GiB a worker", title=title, title_justify="left"
    )
    for place, members in places.items():
        left = units.get(place, [])
        methods = dict.fromkeys(p.method.name for p in members)
        budgets = sorted({p.budget for p in members if p.budget is not None})
        expected = sum(part.counts[p.key] for p in members)
        have = sum(len(done(p.key) & set(range(part.counts[p.key]))) for p in members)
        memory = max((cost.worker_bytes(unit.points) for unit in left), default=0)
        listing.add_row(
            *place,
            str(len(members)),
            str(len(methods)),
            " ".join(map(str, budgets)),
            str(max(part.counts[p.key] for p in members)),
            f"{have}/{expected}",
            clock(sum(map(work.seconds, left))) if left else "-",
            *([f"{_gpu_hours(work, left):.1f}"] if gpu else []),
            f"{memory / 2**30:.1f}" if left else "-",
        )
    return listing


def _gpu_hours(work: Work, units: Sequence[Unit]) -> float:
    return sum(map(work.seconds, units)) * work.workers.gpus / 3600
