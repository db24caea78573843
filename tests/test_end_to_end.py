"""The whole path with real parts: model, compiled kernels, Ray, ledger, MLflow, a figure."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from tiny_models import save_byte_model

from quest_dist import compose, launch
from quest_dist.bench.__main__ import main as bench
from quest_dist.ledger import Ledger

GRID = (
    "name=tiny",
    "grid.model=[tiny]",
    "grid.task=[passkey,pg19]",
    "grid.method=[full,quest,h2o,tova]",
    "grid.budget=[32,64]",
    "task.passkey.samples=2",
    "task.passkey.length=480",
    "task.passkey.max_new_tokens=3",
    "task.pg19.samples=2",
    "task.pg19.prefill=200",
    "task.pg19.tokens=8",
    "figures=[curves]",
    "cluster.cpus_per_worker=1",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An override that adds a tiny local model."""
    folder = tmp_path_factory.mktemp("model")
    save_byte_model(folder)
    return f"+model.tiny={{source:local,path:{folder},label:Tiny,dtype:float32}}"


def contents(output_dir: Path) -> dict[tuple[str, int], tuple[object, ...]]:
    """What the ledger holds, without clocks."""
    with (output_dir / "tiny" / "points.csv").open() as file:
        points = [row["point"] for row in csv.DictReader(file)]
    with Ledger(output_dir / "ledger.db") as ledger:
        records = [record for point in points for record in ledger.records(point)]
    return {
        (r["point"], r["sample"]): (r["score"], r["prediction"], r["attended"], r["error"])
        for r in records
    }


def test_a_sweep_runs_through_ray_and_inline_to_equal_records(model: str, tmp_path: Path) -> None:
    for backend in ("inline", "local"):
        out = tmp_path / backend
        extra = ["tracking=none"] if backend == "local" else []
        config = compose.composed([*GRID, model, f"cluster={backend}", f"output_dir={out}", *extra])
        assert launch.run(config) == launch.FINISHED
    inline, ray = contents(tmp_path / "inline"), contents(tmp_path / "local")
    assert inline == ray
    assert len(inline) == 2 * 7 * 2
    assert not any(error for *_, error in inline.values())
    results = tmp_path / "inline" / "tiny"
    assert (results / "curves.png").stat().st_size > 10_000
    rows = list(csv.DictReader((results / "points.csv").open()))
    assert {row["status"] for row in rows} == {"finished"}
    assert (tmp_path / "inline" / "mlflow.db").exists()


def test_sharing_benchmark_gives_its_summary(model: str, tmp_path: Path) -> None:
    path = tmp_path / "sharing.json"
    overrides = [item for item in GRID if not item.startswith(("grid.task", "figures"))]
    status = bench(
        ["sharing", "--sweep=passkey", "--task=passkey", f"--json={path}", *overrides, model]
    )
    assert status == 0
    summary = json.loads(path.read_text())["summary"]
    assert summary["equal_scores"] is True
    assert summary["equal_tokens"] is True
    assert summary["points"] == 7
    assert summary["speedup"] > 0


def test_benchmark_mistakes_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(["sharing", "--sweep=passkey", "--task=paskey"]) == 2
    assert "did you mean 'passkey'" in capsys.readouterr().err
    assert bench(["sharing", "--sweep=paskey"]) == 2
    assert "did you mean 'passkey'" in capsys.readouterr().err
