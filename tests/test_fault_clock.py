"""A clock that jumps: dates follow it, durations and order do not."""

from __future__ import annotations

import io
import time
from pathlib import Path

import pytest
import tiny_sweep
import tiny_unit
from rich.console import Console
from tiny_models import save_byte_model

from quest_dist import mlflow_store, table, worker
from quest_dist.plan import Point, Spec, Unit

DAY = 86400.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The system's clock, moved by what the list holds."""
    moved, real = [0.0], time.time
    monkeypatch.setattr(time, "time", lambda: real() + moved[0])
    return moved


@pytest.mark.slow
@pytest.mark.parametrize("jump", [-DAY, DAY])
def test_a_sweep_and_its_copy_in_mlflow_outlive_a_jump_of_the_clock(
    tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    plain = tiny_unit.record

    def dated(point: Point, index: int, error: str | None = None) -> dict[str, object]:
        clock[0] = jump if index >= 3 else 0.0
        return plain(point, index, error) | {"finished_at": time.time()}

    monkeypatch.setattr(tiny_unit, "record", dated)
    out, whole = tmp_path / "outputs", tmp_path / "whole"
    console = Console(file=(said := io.StringIO()), width=120)
    given = ("tracking=mlflow", "cluster.samples_per_unit=1")
    assert tiny_sweep.run(out, *given, out=console) == 0
    assert "MLflow at" not in said.getvalue()
    monkeypatch.setattr(tiny_unit, "record", plain)
    assert tiny_sweep.run(whole) == 0
    here, there = (table.from_csv(tiny_sweep.table(folder)) for folder in (out, whole))
    assert [r.score for r in here] == [r.score for r in there]
    assert [r.seconds for r in here] == [r.seconds for r in there]
    client = mlflow_store.connect(f"sqlite:///{out}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "quest_dist/tiny"]
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 3 + 2 + 1
    for run in runs:
        assert run.info.status == "FINISHED"
        assert run.info.start_time <= run.info.end_time
    assert tiny_sweep.run(out, *given) == 0
    assert len(client.search_runs([experiment.experiment_id])) == len(runs)


def test_a_worker_measures_durations_by_a_clock_that_never_goes_back(
    tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = time.time

    def falling() -> float:
        clock[0] -= DAY
        return moved()

    monkeypatch.setattr(time, "time", falling)
    save_byte_model(tmp_path)
    point = Point(
        model=Spec("tiny", {"source": "local", "path": str(tmp_path), "dtype": "float32"}),
        task=Spec("passkey", {"_target_": "quest_dist.tasks.passkey.Passkey", "length": 480}),
        data=Spec("generated", {"_target_": "quest_dist.tasks.generated.Generated"}),
        method=Spec("full", {"_target_": "quest_dist.methods.full.Full", "budgeted": False}),
        protocol=Spec("quest_paper", {"tail": "question"}),
        budget=None,
        page_size=16,
        dense_layers=1,
        seed=0,
    )
    runtime = worker.Runtime(threads=1, gpus=0.0).to_dict()
    (report,) = worker.run(Unit((point,), (0,)).to_dict(), runtime)
    (record,) = report["records"]
    assert record["error"] is None
    assert 0 < record["seconds"] < 60
    assert 0 < record["prefill_seconds"] < 60
