"""What a launch says before it begins: time, memory, and what fits no worker here."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import tiny_sweep
from rich.console import Console

from quest_dist import cluster, cost, launch, work
from quest_dist.ledger import Ledger
from quest_dist.plan import Unit


def run(folder: Path, *overrides: str) -> tuple[int, str]:
    out = Console(file=io.StringIO(), width=120)
    status = tiny_sweep.run(folder, *overrides, out=out)
    return status, out.file.getvalue()  # type: ignore[attr-defined]


def unit(folder: Path, *overrides: str) -> Unit:
    return Unit(tiny_sweep.points(folder, *overrides), (0,))


def test_nothing_is_begun_where_no_unit_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "worker_memory", lambda cluster: 2**20)
    shape = "+model.tiny.shape={parameters:1000}"
    with pytest.raises(ValueError, match=r"passkey on tiny: needs .* GiB .*check_memory=false"):
        run(tmp_path / "out", shape)
    assert run(tmp_path / "out", shape, "cluster.check_memory=false")[0] == launch.FINISHED


def test_of_a_model_without_a_shape_nothing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "worker_memory", lambda cluster: 2**20)
    assert run(tmp_path / "out")[0] == launch.FINISHED


def test_what_fits_runs_and_the_rest_is_said_and_kept_as_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = "+model.large={source:local,path:" + str(tmp_path / "tiny_model") + "}"
    large = "+model.large.shape={parameters:9000000000}"
    chosen = (both, large, "+model.tiny.shape={parameters:1000}", "grid.model=[tiny,large]")
    monkeypatch.setattr(work, "worker_memory", lambda cluster: 12 * 2**30)
    status, said = run(tmp_path / "out", *chosen)
    assert status == launch.INCOMPLETE
    assert "not begun: passkey on large: needs" in said
    with Ledger(tmp_path / "out" / "ledger.db") as ledger:
        for point in tiny_sweep.points(tmp_path / "out", *chosen):
            failed = ledger.failures(point.key)
            assert len(failed) == (6 if point.model.name == "large" else 0)
            assert len(ledger.done(point.key)) == (0 if point.model.name == "large" else 6)
    monkeypatch.setattr(work, "worker_memory", lambda cluster: None)
    status, _ = run(tmp_path / "out", *chosen)
    assert status == launch.FINISHED


def test_memory_is_known_of_this_machine_only() -> None:
    here = cluster.worker_memory(cluster.Cluster())
    assert here is not None
    assert here >= 2**30
    assert cluster.worker_memory(cluster.Cluster(address="auto")) is None


def test_a_plan_counts_hours_of_gpus_where_workers_have_them(tmp_path: Path) -> None:
    attached = ("plan=true", "cluster=ray", "cluster.address=auto", "cluster.gpus_per_worker=0.5")
    status, said = run(tmp_path / "out", *attached)
    assert status == launch.FINISHED
    assert "GPU hours" in said
    assert "methods: full, quest" in said
    _, without = run(tmp_path / "out", "plan=true")
    assert "GPU hours" not in without
    assert cost.worker_bytes(unit(tmp_path / "out").points) > 0
