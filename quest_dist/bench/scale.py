"""Scale: what many GPUs would make of a sweep, by simulation; no GPU is used or needed.

The points are those of the sweep's configuration, the units those that `work` cuts and orders, and
their seconds those that `cost` estimates for a GPU (or the paces that a ledger has measured, with
--ledger). Those estimates have not been checked on a GPU. What really happens differs from them: a
family of points is slower or faster than its estimate by a factor, its samples by a smaller one,
both drawn from the seed. How that is run is in `simulate`.

    bound    a time that no schedule can beat: one start, then all GPUs busy to the end, or the
             longest sample
    x bound  makespan / bound; the summary has that of the planned units in the planned order
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from quest_dist import compose, cost, plan, prepare, work
from quest_dist.bench.report import Report
from quest_dist.bench.simulate import Driver, Job, Outcome, shortest, simulate
from quest_dist.cluster import Cluster
from quest_dist.ledger import Ledger
from quest_dist.plan import Point, Unit
from quest_dist.search import Search
from quest_dist.work import Work

#: Samples of a task that takes all that LongBench holds.
HELD = {"multifieldqa_en": 150}
HELD_OTHERS = 200
FAMILY_SPREAD, SAMPLE_SPREAD = 0.4, 0.2  # standard deviations of the logarithm of the factors
COLUMNS = (
    *("sweep", "GPUs", "units cut", "order", "breaks/h", "units", "makespan s", "bound s"),
    *("x bound", "loads", "broken", "lost s", "rounds", "driver busy"),
)
#: How often a worker breaks, an hour.
RATES = (0.1, 1.0)
REPEATS = 5  # of what is left to chance, whose means are shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this benchmark."""
    parser.add_argument("--gpus", type=int, nargs="+", default=[64, 1024], help="(64 1024)")
    parser.add_argument(
        "--sweep",
        nargs="+",
        default=["longbench_budgets", "longbench_budgets:10", "paper"],
        metavar="NAME[:N]",
        help="sweeps to run, with N seeds",
    )
    parser.add_argument("--start", type=float, default=20.0, help="seconds to start a worker (20)")
    parser.add_argument(
        "--read", type=float, default=1.0, help="GB of weights read a second by a worker (1)"
    )
    parser.add_argument("--unit-ms", type=float, default=12.0, help="driver's time a unit")
    parser.add_argument("--report-ms", type=float, default=3.0, help="driver's time a report")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (0)")
    parser.add_argument("--ledger", type=Path, help="take measured paces from this ledger.db")
    parser.add_argument(
        "overrides", nargs="*", default=["profile=paper"], help="of the sweeps (profile=paper)"
    )


def run(options: argparse.Namespace) -> Report:
    """Simulate; ValueError for names and numbers that mean nothing."""
    for name in ("start", "unit_ms", "report_ms"):
        if (value := getattr(options, name)) < 0:
            raise ValueError(f"--{name.replace('_', '-')}={value:g}: must be at least 0")
    if options.read <= 0:
        raise ValueError(f"--read={options.read:g}: must be above 0")
    if min(options.gpus) < 1:
        raise ValueError(f"--gpus={options.gpus}: must be above 0")
    if options.ledger is not None and not options.ledger.exists():
        raise ValueError(f"--ledger={options.ledger}: no such file")
    rows: list[tuple[Any, ...]] = []
    summary: dict[str, float] = {}
    for name in options.sweep:
        points, counts = _points(name, options.overrides)
        for gpus in options.gpus:
            found = _scenarios(Scene(name, points, counts, gpus, options))
            rows += found
            summary[f"{name} x_bound {gpus}"] = found[0][8]
    return Report(
        name="a sweep on many GPUs, simulated",
        columns=COLUMNS,
        rows=rows,
        summary=summary,
        setting={
            "overrides": list(options.overrides),
            "start_seconds": options.start,
            "read_gb_a_second": options.read,
            "driver_ms": {"unit": options.unit_ms, "report": options.report_ms},
            "spread": {"family": FAMILY_SPREAD, "sample": SAMPLE_SPREAD},
            "seconds": str(options.ledger or "estimates of quest_dist.cost, not measured on a GPU"),
            "seed": options.seed,
            "cut": {
                "least_seconds": work.UNIT_SECONDS,
                "units_a_worker": work.UNITS_PER_WORKER,
                "most_seconds": work.SLICE_SECONDS,
            },
        },
    )


class Scene:
    """A sweep's points on so many GPUs, and the true seconds of its samples."""

    def __init__(
        self,
        name: str,
        points: Sequence[Point],
        counts: dict[str, int],
        gpus: int,
        options: argparse.Namespace,
    ) -> None:
        self.name, self.points, self.counts, self.gpus = name, tuple(points), counts, gpus
        self.options = options
        self.pace = _paces(options.ledger)

    def work(self, samples_per_unit: int | None = None) -> Work:
        """What the planner makes of it."""
        cluster = Cluster(
            address="simulated",
            workers=self.gpus,
            device="cuda",
            samples_per_unit=samples_per_unit,
        )
        part = prepare.Part(self.name, "", (), self.points, self.counts, Search())
        sweep = prepare.Sweep(
            name=self.name,
            about="",
            output_dir=Path(),
            parts=(part,),
            points=self.points,
            counts=self.counts,
            metrics={},
            exclusive=frozenset(),
            cluster=cluster,
            tracking={},
            config={},
        )
        return Work.of(sweep, None)

    def job(self, unit: Unit) -> Job:
        """A unit with the seconds that its samples really take, however it is cut."""
        family, seed = unit.first.family, self.options.seed
        said = cost.sample_seconds(unit.points, 4, True, self.pace)
        said *= random.Random(f"{seed} {family}").lognormvariate(0, FAMILY_SPREAD)
        samples = tuple(
            said * random.Random(f"{seed} {family} {index}").lognormvariate(0, SAMPLE_SPREAD)
            for index in unit.samples
        )
        weights = 2 * int(cost.shape(unit.first)["parameters"])
        load = self.options.start + weights / (1e9 * self.options.read)
        return Job(unit.first.model.name, load, samples)

    def outcomes(self, units: Sequence[Unit], rate: float) -> tuple[list[Outcome], float]:
        """What comes of units in this order, each time that it is tried, and the bound."""
        jobs = [self.job(unit) for unit in units]
        driver = Driver(self.options.unit_ms / 1e3, self.options.report_ms / 1e3)
        seeds = range(self.options.seed, self.options.seed + (REPEATS if rate else 1))
        found = [simulate(jobs, self.gpus, driver, rate, seed=seed) for seed in seeds]
        return found, shortest(jobs, self.gpus)


def _scenarios(scene: Scene) -> list[tuple[Any, ...]]:
    planned = scene.work()
    cuts: list[tuple[str, Sequence[Unit]]] = [("as planned", planned.units)]
    for size, said in ((1, "one sample"), (8, "8 samples"), (10**9, "not cut")):
        cuts.append((said, scene.work(size).units))
    rows = [_row(scene, cut, "as planned", units, 0.0) for cut, units in cuts]
    place = {point.key: number for number, point in enumerate(scene.points)}
    given = sorted(planned.units, key=lambda unit: (place[unit.first.key], unit.samples))
    mixed = random.Random(scene.options.seed).sample(given, len(given))
    longest = sorted(given, key=planned.seconds, reverse=True)
    for order, units in (("longest first", longest), ("as given", given), ("random", mixed)):
        rows.append(_row(scene, "as planned", order, units, 0.0))
    rows += [_row(scene, "as planned", "as planned", planned.units, rate) for rate in RATES]
    return rows


def _row(scene: Scene, cut: str, order: str, units: Sequence[Unit], rate: float) -> tuple[Any, ...]:
    found, bound = scene.outcomes(units, rate)
    makespan = fmean(one.makespan for one in found)
    counted = (
        fmean(one.loads for one in found),
        fmean(one.broken for one in found),
        fmean(one.lost for one in found),
        fmean(one.rounds for one in found),
        fmean(one.driver / one.makespan for one in found),
    )
    where = (scene.name, scene.gpus, cut, order, rate, len(units))
    return (*where, makespan, bound, makespan / bound, *counted)


def _points(name: str, overrides: Sequence[str]) -> tuple[list[Point], dict[str, int]]:
    """The points of a sweep, or of its parts, that run side by side, and their samples.

    Nothing is downloaded: models go by their names and data by none. Times, which run alone, are
    left out, and a search counts as its whole grid.
    """
    name, _, seeds = name.partition(":")
    if seeds and not (seeds.isdigit() and int(seeds)):
        raise ValueError(f"--sweep={name}:{seeds}: a whole number of seeds")
    given = [f"+sweep={name}", *overrides]
    given += [f"grid.seed=[{','.join(map(str, range(int(seeds))))}]"] if seeds else []
    config = compose.composed(given)
    found: dict[str, Point] = {}
    counts: dict[str, int] = {}
    for part in compose.parts(config, given) or [config]:
        groups = ("model", "task", "method")
        specs = {group: prepare.specs_of(part[group], group) for group in groups}
        source = plan.Spec("data", part["data"], {})
        data = dict.fromkeys(part["grid"]["task"], source)
        protocol = prepare.protocol_of(part["protocol"])
        for point in plan.points(part["grid"], part["exclude"], specs, data, protocol):
            if not getattr(point.task.target(), "exclusive", False):
                held = HELD.get(point.task.name, HELD_OTHERS)
                asked = point.task.settings.get("samples") or held
                found[point.key] = point
                counts[point.key] = max(counts.get(point.key, 0), min(int(asked), held))
    if not found:
        raise ValueError(f"--sweep={name}: it has only times, which run alone")
    return list(found.values()), counts


def _paces(path: Path | None) -> Callable[[str, str], tuple[float, float] | None]:
    """What a ledger has measured, asked for once a model and task."""
    known: dict[tuple[str, str], tuple[float, float] | None] = {}

    def pace(model: str, task: str) -> tuple[float, float] | None:
        if path is None:
            return None
        if (model, task) not in known:
            with Ledger(path) as ledger:
                known[model, task] = ledger.pace(model, task)
        return known[model, task]

    return pace
