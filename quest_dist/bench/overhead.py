"""Overhead: what scheduling and tracking cost, against the evaluation that they are for.

Launches of growing size whose evaluation takes no time (`instant`) through everything else that a
sweep goes through: configuration, planning, Ray, ledger, MLflow on SQLite, tables. Then two real
ones, of the bundled model. Each in a process and a folder of its own. The summary:

    driver_ms_per_point            the driver's time a point of the largest launch: seconds that its
                                   process computed, all threads together, imports, MLflow's empty
                                   database and closing tables included
    driver_ms_per_point_untracked  the same without MLflow
    overhead_share                 of a real sweep with everything on: the driver's time / wall
    efficiency_2                   samples a second of two workers with a thread each, against twice
                                   those of one, from the first sample's begin to the last's end
    driver_growth_mib              the driver's largest memory in the largest launch, less that in
                                   the next smaller one, both tracked
    resume_s                       the same command again when all is done: seconds of the process

Start-up (imports, Ray, MLflow's tables) is in these; `driver_ms_per_further_point` of the setting
is what a point more costs, from the next smaller launch to the largest.

`wall` holds Ray's start and its waiting too, which is time that a real evaluation fills. `held up`
is how long a report kept its worker waiting for the driver: the longest is the scheduling loop's
longest stall, which tracking must not lengthen.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quest_dist import compose, machine_state, prepare, schedule
from quest_dist.bench import instant
from quest_dist.bench.one_launch import Took, took
from quest_dist.bench.report import Report
from quest_dist.ledger import Ledger
from quest_dist.work import Work

#: A family of ten points; ten tasks; then seeds.
FAMILY = ("grid.model=[smollm2]", "grid.method=[full,quest,tightbound,tova]")
BUDGETS = "grid.budget=[64,128,256]"
POINTS = 10
TASKS = (
    *("passkey", "qasper", "hotpotqa", "gov_report", "triviaqa", "narrativeqa"),
    *("multifieldqa_en", "niah_single", "niah_multikey", "niah_multivalue"),
)
#: Real work that takes the same time a sample: 13 points of 16 samples, in units of two.
REAL = (
    *("grid.model=[smollm2]", "grid.task=[passkey]", "task.passkey.length=2048"),
    *("grid.method=[full,quest,tightbound,streaming]", "grid.budget=[64,128,256,512]"),
    *("task.passkey.samples=16", "cluster.samples_per_unit=2", "cluster.cpus_per_worker=1"),
)
TARGETS = {
    "driver_ms_per_point": "<= 40",
    "driver_ms_per_point_untracked": "<= 5",
    "overhead_share": "<= 0.05",
    "efficiency_2": ">= 0.85",
    "driver_growth_mib": "<= 100",
    "resume_s": "<= 10",
}
COLUMNS = (
    *("launch", "points", "units", "samples", "wall s", "driver s", "driver ms/point"),
    *("wall ms/point", "held up ms", "p99 ms", "peak MiB"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this benchmark."""
    parser.add_argument(
        "--points", type=int, nargs="+", default=[10, 100, 1000], help="sizes of instant launches"
    )
    parser.add_argument(
        "--sweep", default="longbench_budgets", help="the real sweep (default: longbench_budgets)"
    )
    parser.add_argument("--limit", type=int, help="its samples a task (default: all)")
    parser.add_argument("overrides", nargs="*", help="further overrides of every launch")


def run(options: argparse.Namespace) -> Report:
    """Measure all launches; ValueError for sizes that cannot be made."""
    sizes = sorted(set(options.points))
    for size in sizes:
        tasks_and_seeds(size)
    with tempfile.TemporaryDirectory(prefix="quest-overhead-") as folder:
        return _measured(sizes, options, Path(folder))


def tasks_and_seeds(points: int) -> tuple[int, int]:
    """How many tasks and seeds make so many points; ValueError where none do."""
    families, rest = divmod(points, POINTS)
    tasks = min(families, len(TASKS))
    if rest or not tasks or families % tasks:
        raise ValueError(
            f"--points={points}: 10 a task up to {POINTS * len(TASKS)}, then whole hundreds"
        )
    return tasks, families // tasks


class Launches:
    """Launches in folders under one, and a row of the table for each."""

    def __init__(self, folder: Path, overrides: Sequence[str]) -> None:
        self.folder, self.overrides = folder, list(overrides)
        self.rows: list[tuple[Any, ...]] = []
        self.sweeps: dict[str, prepare.Sweep] = {}

    def instant(self, points: int, tracked: bool, *more: str, again: bool = False) -> Took:
        """A launch of so many points that evaluates nothing; `again`: once it is done."""
        tasks, seeds = tasks_and_seeds(points)
        grid = [*FAMILY, BUDGETS, f"grid.task=[{','.join(TASKS[:tasks])}]"]
        grid.append(f"grid.seed=[{','.join(map(str, range(seeds)))}]")
        tracking = "tracking=mlflow" if tracked else "tracking=none"
        name = "-".join(["instant", str(points), tracking.partition("=")[2], *map(_short, more)])
        return self._launch(name, [*grid, tracking, *more], instant.RUN, again)

    def real(self, name: str, *overrides: str) -> Took:
        """A launch that evaluates."""
        return self._launch(name, overrides, schedule.WORKER, False)

    def _launch(self, name: str, overrides: Sequence[str], run_unit: str, again: bool) -> Took:
        place = [f"name={name}", f"output_dir={self.folder / name}"]
        config = compose.composed([*overrides, *place, *self.overrides])
        sweep = self.sweeps[name] = prepare.prepare(config)
        units = 0 if again else len(Work.of(sweep, None).all_units)
        found = took(config, run_unit)
        if found.status:
            raise RuntimeError(f"{name}: the launch left points unfinished")
        held = [] if again else self.held_up(sweep)
        points = len(sweep.points)
        samples = len({(p.family, s) for p in sweep.points for s in range(sweep.counts[p.key])})
        called = f"{name}, again" if again else name
        costs = (1e3 * found.busy / points, 1e3 * found.wall / points)
        waits = (1e3 * max(held), 1e3 * _percentile(held, 99)) if held else (None, None)
        self.rows.append(
            (called, points, units, samples, found.wall, found.busy, *costs, *waits, found.peak)
        )
        print(f"{called}: {found.wall:.1f} s, driver {found.busy:.1f} s", file=sys.stderr)
        return found

    def held_up(self, sweep: prepare.Sweep) -> list[float]:
        """Seconds that each report of an instant launch held its worker up."""
        first = {point.family: point.key for point in sweep.points}
        with Ledger(sweep.output_dir / "ledger.db") as ledger:
            records = [record for key in first.values() for record in ledger.records(key)]
        return [float(r["metrics"]["waited"]) for r in records if "waited" in r["metrics"]]

    def samples_a_second(self, name: str) -> float:
        """Of a real launch of one task, from the first sample's begin to the last one's end."""
        first = self.sweeps[name].points[0].key
        with Ledger(self.folder / name / "ledger.db") as ledger:
            records = ledger.records(first)
        ends = [float(record["finished_at"]) for record in records]
        spent = [float(r["prefill_seconds"]) + float(r["seconds"]) for r in records]
        begin = min(end - seconds for end, seconds in zip(ends, spent, strict=True))
        return len(records) / (max(ends) - begin)


def _measured(sizes: Sequence[int], options: argparse.Namespace, folder: Path) -> Report:
    before = machine_state.read()
    launches = Launches(folder, options.overrides)
    plain = {size: launches.instant(size, False) for size in sizes}
    tracked = {size: launches.instant(size, True) for size in sizes}
    resumed = launches.instant(sizes[-1], True, again=True)
    middle = sizes[len(sizes) // 2]
    finely = launches.instant(middle, False, "cluster.samples_per_unit=1")
    rates = []
    for workers in (1, 2):
        name = f"passkey-{workers}-workers"
        launches.real(name, *REAL, "tracking=none", f"cluster.workers={workers}")
        rates.append(launches.samples_a_second(name))
    limit = "null" if options.limit is None else str(options.limit)
    whole = launches.real(options.sweep, f"+sweep={options.sweep}", f"limit={limit}")
    units = {row[0]: row[2] for row in launches.rows}
    fine, coarse = (units[f"instant-{middle}-none{end}"] for end in ("-samples_per_unit-1", ""))
    largest, smaller = tracked[sizes[-1]], tracked[sizes[max(0, len(sizes) - 2)]]
    more = max(1, sizes[-1] - sizes[max(0, len(sizes) - 2)])
    return Report(
        name="what launching costs",
        columns=COLUMNS,
        rows=launches.rows,
        summary={
            "driver_ms_per_point": 1e3 * largest.busy / sizes[-1],
            "driver_ms_per_point_untracked": 1e3 * plain[sizes[-1]].busy / sizes[-1],
            "overhead_share": whole.busy / whole.wall,
            "efficiency_2": rates[1] / (2 * rates[0]),
            "driver_growth_mib": largest.peak - smaller.peak,
            "resume_s": resumed.whole,
        },
        setting={
            "driver_ms_per_unit": 1e3 * (finely.busy - plain[middle].busy) / (fine - coarse),
            "wall_ms_per_unit": 1e3 * (finely.wall - plain[middle].wall) / (fine - coarse),
            "samples_a_second": rates,
            "sweep": f"{options.sweep}, limit={limit}",
            "driver_ms_per_further_point": 1e3 * (largest.busy - smaller.busy) / more,
            "driver_ms_per_further_point_untracked": 1e3
            * (plain[sizes[-1]].busy - plain[sizes[max(0, len(sizes) - 2)]].busy)
            / more,
            "overrides": list(options.overrides),
            "machine_state": machine_state.stated(before, machine_state.read()),
        },
        targets=TARGETS,
    )


def _short(override: str) -> str:
    return override.rpartition(".")[2].replace("=", "-")


def _percentile(values: Sequence[float], percent: int) -> float:
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
