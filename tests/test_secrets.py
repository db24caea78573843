"""A sweep that is given secrets keeps none of them: no file, no log, no row of MLflow."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import save_byte_model

from quest_dist import compose
from quest_dist.folders import PACKAGE
from quest_dist.tracker import Sweep, Tracker

PLANTED = {
    "HF_TOKEN": "hf_plantedToken123",
    "MLFLOW_TRACKING_PASSWORD": "plantedPassword456",
    "AWS_SECRET_ACCESS_KEY": "planted/Key+789",
}
TYPED = "plantedByHand321"
GRID = (
    "name=tiny",
    "grid.model=[tiny]",
    "grid.task=[passkey]",
    "grid.method=[full,quest]",
    "grid.budget=[32]",
    "task.passkey.samples=2",
    "task.passkey.length=480",
    "task.passkey.max_new_tokens=3",
    "figures=[curves]",
    "cluster=inline",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An override that adds a tiny local model."""
    folder = tmp_path_factory.mktemp("model")
    save_byte_model(folder)
    return f"+model.tiny={{source:local,path:{folder},label:Tiny,dtype:float32}}"


def run(folder: Path, *overrides: str, **changes: str) -> str:
    """Run the command to its end; return all that it said."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
    done = subprocess.run(
        [sys.executable, "-m", "quest_dist.sweep", *GRID, f"output_dir={folder}", *overrides],
        env={**kept, **PLANTED, "PYTHONPATH": str(PACKAGE.parent), **changes},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def leaks(folder: Path, said: str) -> list[str]:
    """Where a secret is found: "PATH: SECRET"."""
    secrets = [*PLANTED.values(), TYPED]
    texts = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    texts["its output"] = said.encode()
    return [f"{n}: {s}" for n, text in texts.items() for s in secrets if s.encode() in text]


def test_no_output_of_a_sweep_holds_a_secret(model: str, tmp_path: Path) -> None:
    said = run(
        tmp_path,
        model,
        f"+cluster.env.SERVICE_TOKEN={TYPED}",
        "+cluster.env.HF_TOKEN='${oc.env:HF_TOKEN}'",
        f"about='records of https://me:{TYPED}@data.example/x'",
    )
    assert leaks(tmp_path, said) == []
    texts = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    # What stands in for them was written: in the configuration, the command and MLflow's database.
    assert sum(b"SERVICE_TOKEN=***" in text for text in texts) >= 3
    config = next(tmp_path.glob("tiny/hydra/*/config.yaml")).read_text()
    assert "SERVICE_TOKEN: ***" in config
    assert "HF_TOKEN: ${oc.env:HF_TOKEN}" in config
    names = {path.name for path in tmp_path.rglob("*")}
    assert names >= {"mlflow.db", "ledger.db", "launch.json", "points.csv", "report.html"}
    assert names >= {"overrides.yaml", "samples.json"}


def test_nor_where_the_store_is_a_server_with_a_password(model: str, tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        uri = f"http://me:{TYPED}@127.0.0.1:{closed.getsockname()[1]}"
        said = run(tmp_path, model, MLFLOW_TRACKING_URI=uri, MLFLOW_HTTP_REQUEST_MAX_RETRIES="0")
    assert "MLflow at http://me:***@127.0.0.1" in said
    assert leaks(tmp_path, said) == []


def test_the_command_that_shows_mlflow_names_no_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"postgresql://me:{TYPED}@db.example/mlflow"
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shown = Tracker({"uri": uri}, tmp_path, Sweep("s"), None).command()  # type: ignore[arg-type]
    assert shown.endswith("postgresql://me:***@db.example/mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    shown = Tracker({}, tmp_path, Sweep("s"), None).command()  # type: ignore[arg-type]
    assert shown.endswith('--backend-store-uri "$MLFLOW_TRACKING_URI"')


@pytest.mark.parametrize(
    "override",
    [
        "about='${oc.env:HF_TOKEN}'",
        "about='${oc.env:HF_TOKEN,none}'",
        "about='x ${oc.decode:${oc.env:HF_TOKEN}}'",
        "+model.x={label: '${oc.env:HF_TOKEN}'}",
        "tracking.experiment='${oc.env:MLFLOW_TRACKING_PASSWORD}'",
    ],
)
def test_a_configuration_cannot_take_secrets_out_of_the_environment(
    override: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="holds a secret, which only") as caught:
        compose.composed(["+sweep=smoke", override])
    assert not any(value in str(caught.value) for value in PLANTED.values())


def test_what_is_no_secret_is_read_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", PLANTED["HF_TOKEN"])
    monkeypatch.setenv("QUEST_PLACE", "here")
    place = "about='${oc.env:QUEST_PLACE} ${oc.env:QUEST_NOWHERE,there}'"
    token = "+cluster.env.HF_TOKEN='${oc.env:HF_TOKEN}'"
    found = compose.composed(["+sweep=smoke", place, token])
    assert found["about"] == "here there"
    assert found["cluster"]["env"]["HF_TOKEN"] == PLANTED["HF_TOKEN"]


def test_an_experiment_is_no_way_out_of_the_output_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    for name in ("../../out", "/etc/out", "a/../../../out", ".."):
        tracker = Tracker({"experiment": name}, tmp_path / "in", Sweep("s"), None)  # type: ignore[arg-type]
        place = tracker.artifacts.resolve()
        assert place.is_relative_to(tmp_path / "in" / "mlartifacts"), name
        assert place != tmp_path / "in" / "mlartifacts"
