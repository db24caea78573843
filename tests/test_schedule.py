"""Inline and Ray Tune deliver the same; what breaks is tried again, then reported, and nothing else
is lost to it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import grids
import pytest
from rich.console import Console
from tiny_unit import models_by_process, started

from quest_dist import cluster, cost, schedule
from quest_dist.cluster import Cluster, Workers
from quest_dist.plan import Unit
from quest_dist.progress import Progress, clock
from quest_dist.schedule import Report

POINTS = grids.points(model=["small", "large"], budget=[64, 128])
UNITS = grids.units(POINTS, samples=4, size=2)


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TINY_LOG", str(tmp_path / "log"))
    return tmp_path / "log"


def run(
    storage: Path, backend: str, units: list[Unit] = UNITS, **settings: Any
) -> tuple[bool, list[Report], list[tuple[tuple[int, ...], str]]]:
    reports: list[Report] = []
    failures: list[tuple[tuple[int, ...], str]] = []
    workers = Workers(2 if backend == "ray" else 1, 1, 0.0)

    def on_failure(unit: Unit, message: str) -> None:
        failures.append((unit.samples, message))

    place = Cluster(backend=backend, **settings)
    with schedule.opened(place, storage, "tiny_unit:run") as run_units:
        finished = run_units(units, workers, reports.append, on_failure)
    return finished, reports, failures


def by_sample(reports: list[Report]) -> dict[tuple[str, int], list[dict[str, Any]]]:
    return {(r["unit"], r["sample"]): r["records"] for r in reports}


@pytest.mark.slow
def test_ray_delivers_what_inline_delivers(tmp_path: Path, log: Path) -> None:
    inline = run(tmp_path, "inline")
    log.unlink()
    tuned = run(tmp_path, "ray")
    assert tuned[0] == inline[0] is True
    assert tuned[2] == inline[2] == []
    assert len(tuned[1]) == len(inline[1]) == 8
    assert by_sample(tuned[1]) == by_sample(inline[1])
    assert len(started(log)) == 8
    # A process is reused within a model and never across models.
    assert all(len(models) == 1 for models in models_by_process(log).values())


@pytest.mark.slow
def test_a_killed_worker_costs_only_the_sample_that_kills_it(
    tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINY_KILL_AT", "0")
    units = grids.units(grids.points(), samples=3, size=3)
    finished, reports, failures = run(tmp_path, "ray", units, max_failures=1)
    assert finished
    assert sorted(r["sample"] for r in reports) == [1, 2]
    assert failures == [((0,), "the worker process died (out of memory?)")]


def test_a_broken_sample_goes_last_and_is_tried_again(
    tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINY_RAISE_AT", "1")
    units = grids.units(grids.points(), samples=4, size=4)
    finished, reports, failures = run(tmp_path, "inline", units, max_failures=2)
    assert finished
    assert sorted(r["sample"] for r in reports) == [0, 2, 3]
    assert failures == [((1,), "RuntimeError: broken on purpose")]
    assert [sample for _, sample, _ in started(log)] == [0, 1, 2, 3, 1, 1]


def test_wrong_input_is_not_tried_again(
    tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINY_REFUSE", "1")
    _, reports, failures = run(tmp_path, "inline", UNITS[:1])
    assert reports == []
    assert failures == [(UNITS[0].samples, "ValueError: refused on purpose")]


def test_an_error_of_the_driver_stops_the_run(tmp_path: Path) -> None:
    def full_disk(report: Report) -> None:
        raise OSError("no space left")

    place = Cluster(backend="inline")
    with (
        schedule.opened(place, tmp_path, "tiny_unit:run") as run_units,
        pytest.raises(OSError, match="no space left"),
    ):
        run_units(UNITS, Workers(1, 1, 0.0), full_disk, lambda unit, message: None)


@pytest.mark.slow
def test_ray_is_started_once_for_all_rounds_and_holds_the_workers_of_each(
    tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    started: list[int] = []
    init = ray.init
    monkeypatch.setattr(
        ray, "init", lambda **given: started.append(given["num_cpus"]) or init(**given)
    )
    units = grids.units(grids.points(), samples=2, size=1)
    reports: list[Report] = []
    with schedule.opened(Cluster(), tmp_path, "tiny_unit:run") as run_units:
        assert started == []
        for count, cpus in ((2, 1), (1, 2), (1, 1)):
            workers = Workers(count, cpus, 0.0)
            assert run_units(units, workers, reports.append, lambda unit, message: None)
    assert started == [2]
    assert len(reports) == 6


def test_workers_that_no_node_can_hold_are_refused() -> None:
    nodes = [{"CPU": 4.0, "GPU": 1.0}, {"CPU": 64.0}]
    cluster.check_fits(4.0, 1.0, nodes)
    cluster.check_fits(64.0, 0.0, nodes)
    with pytest.raises(ValueError, match=r"8 CPUs and 1 GPUs on one node; the largest of 2 nodes"):
        cluster.check_fits(8.0, 1.0, nodes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backend": "dask"}, "choose ray or inline"),
        ({"workers": 0}, "cluster.workers=0"),
        ({"gpus_per_worker": 1.5}, "a fraction up to 1 or a whole number"),
        ({"max_failures": -1}, "cluster.max_failures=-1"),
        ({"cpus_per_worker": 100_000}, "this machine has"),
        ({"gpus_per_worker": 64.0}, "cluster.gpus_per_worker=64: this machine has"),
    ],
)
def test_wrong_cluster_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cluster.fit(Cluster(**settings), memory_per_worker=1)


def test_workers_share_cpus_and_stay_within_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "available_cpus", lambda: 8)
    monkeypatch.setattr(cluster, "available_gpus", lambda: 0)
    monkeypatch.setattr(cluster, "available_memory", lambda: 10 * 2**30)
    assert cluster.fit(Cluster(), 2**30) == Workers(7, 1, 0.0)
    assert cluster.fit(Cluster(), 3 * 2**30) == Workers(2, 4, 0.0)
    assert cluster.fit(Cluster(), 99 * 2**30) == Workers(1, 8, 0.0)
    assert cluster.fit(Cluster(workers=2, cpus_per_worker=3), 1) == Workers(2, 3, 0.0)
    assert cluster.fit(Cluster(backend="inline"), 1) == Workers(1, 8, 0.0)
    monkeypatch.setattr(cluster, "available_gpus", lambda: 2)
    monkeypatch.setattr(cluster, "lacking_for_gpus", lambda: "")
    assert cluster.fit(Cluster(gpus_per_worker=1), 1) == Workers(2, 4, 1.0)
    assert cluster.fit(Cluster(gpus_per_worker=0.25), 1).count == 8


def test_estimates_grow_with_work_and_give_way_to_measurement() -> None:
    few, many = tuple(grids.points(budget=[64])), tuple(grids.points(budget=[64, 128, 256]))
    assert cost.sample_seconds(few, 1, False) < cost.sample_seconds(many, 1, False)
    assert cost.sample_seconds(many, 4, False) < cost.sample_seconds(many, 1, False)
    assert cost.sample_seconds(many, 1, True) < cost.sample_seconds(many, 1, False)
    assert cost.worker_bytes(few) < cost.worker_bytes(many)
    assert cost.sample_seconds(many, 1, False, lambda model, task: (10.0, 2.0)) == 10 + 2 * 4


def test_progress_prints_lines_where_there_is_no_terminal(tmp_path: Path) -> None:
    out = Console(file=io.StringIO(), width=120)
    with Progress(POINTS, UNITS, lambda key: [], lambda unit: 1.0, "2 workers", out) as progress:
        _, reports, _ = run(tmp_path, "inline")
        for report in reports:
            progress.report(report)
    text = out.file.getvalue()  # type: ignore[attr-defined]
    assert "8 samples to run" in text
    assert "8/8 samples; qasper" in text
    assert (clock(59.6), clock(61), clock(3720)) == ("1:00", "1:01", "1 h 02 min")
