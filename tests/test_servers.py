"""Real tracking servers, killed and started again, away, silent, or over PostgreSQL: a sweep never
waits for one, and MLflow ends up with everything once."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tracking_server
from tracking_server import Server

from quest_dist import mlflow_store
from quest_dist.ledger import Ledger

pytestmark = pytest.mark.slow

#: Each seed is a unit of three points, 0.6 s long, so that points end all the time.
SECONDS, SAMPLES, SEEDS = 0.15, 4, 24
GRID = (
    "tracking=mlflow",
    f"task.passkey.samples={SAMPLES}",
    f"cluster.samples_per_unit={SAMPLES}",
    f"grid.seed=[{','.join(map(str, range(SEEDS)))}]",
)
POINTS, CURVES = 3 * SEEDS, 2 * SEEDS
WARNING = re.compile(r"results are safe")


@pytest.fixture(scope="module")
def only_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server over SQLite for all tests; each has an experiment of its own."""
    folder = tmp_path_factory.mktemp("server")
    made = Server(folder, f"sqlite:///{folder}/server.db")
    yield made
    made.kill()


@pytest.fixture
def server(only_server: Server) -> Server:
    """The server, running."""
    only_server.start()
    return only_server


def start(out: Path, uri: str, *overrides: str, seconds: float = SECONDS) -> Any:
    here = Path(__file__).parent
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(here.parent), str(here), *sys.path[1:]]),
        "TINY_SECONDS": str(seconds),
        "MLFLOW_TRACKING_URI": uri,
        "MLFLOW_EXPERIMENT_NAME": out.name,
    }
    command = [sys.executable, str(here / "tiny_sweep.py"), str(out), *GRID, *overrides]
    return subprocess.Popen(
        command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def ended(process: Any, timeout: float = 240) -> str:
    """What a sweep said, both ways; it must have ended well."""
    text, errors = process.communicate(timeout=timeout)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    assert "View run" not in text  # MLflow's own words, twice a point
    return str(text + errors)


def held(uri: str, experiment: str) -> list[Any]:
    """All live runs of an experiment."""
    client = mlflow_store.connect(uri)
    found = client.get_experiment_by_name(experiment)
    return list(client.search_runs([found.experiment_id], max_results=1000)) if found else []


def check_whole(uri: str, out: Path) -> None:
    """MLflow has every point and curve once, with every value once, and the sweep's artifacts."""
    runs = held(uri, out.name)
    kinds = Counter(run.data.tags["quest.kind"] for run in runs)
    assert kinds == {"point": POINTS, "curve": CURVES, "sweep": 1}
    names = Counter((run.data.tags["quest.kind"], run.data.tags["quest.key"]) for run in runs)
    assert max(names.values()) == 1
    assert {run.info.status for run in runs} == {"FINISHED"}
    client = mlflow_store.connect(uri)
    curves = {run.info.run_id for run in runs if run.data.tags["quest.kind"] == "curve"}
    for run in runs:
        for name in ("score", "score/passkey"):
            if name in run.data.metrics:
                history = client.get_metric_history(run.info.run_id, name)
                assert len({metric.step for metric in history}) == len(history)
        if run.data.tags["quest.kind"] == "point":
            assert run.data.tags["mlflow.parentRunId"] in curves
    (top,) = [run for run in runs if run.data.tags["quest.kind"] == "sweep"]
    assert top.data.metrics["progress"] == 100
    assert "points.csv" in {file.path for file in client.list_artifacts(top.info.run_id)}
    point = next(run for run in runs if run.data.tags["quest.kind"] == "point")
    kept = client.download_artifacts(point.info.run_id, "samples.json", str(out))
    assert "answer 0" in Path(kept).read_text()


def check_not_held_up(out: Path, seconds: float = SECONDS) -> None:
    """Samples followed each other as if there were no tracking; nothing ran twice."""
    with Ledger(out / "ledger.db") as ledger:
        ran = ledger.ran()
    assert len(ran) == len({(each.unit, each.sample) for each in ran}) == SAMPLES * SEEDS
    least = SAMPLES * SEEDS * seconds
    took = ran[-1].ended - ran[0].started
    print(f"{took:.1f} s of samples, {least:.1f} s at least")
    assert took < least + 5  # less than one time-out


def test_a_server_killed_and_started_again_gets_everything_once(
    tmp_path: Path, server: Server
) -> None:
    out = tmp_path / "restarted"
    sweep = start(out, server.uri)
    ends = time.monotonic() + 120
    while len(held(server.uri, out.name)) < 5:
        assert time.monotonic() < ends, "nothing came"
        assert sweep.poll() is None
        time.sleep(0.2)
    server.kill()
    ends = time.monotonic() + 7  # at least one try in vain, the last one if no other
    while time.monotonic() < ends and sweep.poll() is None:
        time.sleep(0.2)
    server.start()
    said = ended(sweep)
    assert len(WARNING.findall(said)) == 1, said
    check_not_held_up(out)
    if "MLflow lacks some" in said:  # it ended before the server was back
        ended(start(out, server.uri))
    check_whole(server.uri, out)


def test_a_server_that_is_away_is_one_warning_and_gets_all_later(
    tmp_path: Path, server: Server
) -> None:
    out = tmp_path / "away"
    said = ended(start(out, f"http://127.0.0.1:{tracking_server.free_port()}"))
    assert len(WARNING.findall(said)) == 1, said
    assert "MLflow lacks some of this; the same command again adds it" in said
    check_not_held_up(out)
    assert "results are safe" not in ended(start(out, server.uri))
    check_not_held_up(out)
    check_whole(server.uri, out)


def test_a_server_that_never_answers_holds_up_nothing(tmp_path: Path, server: Server) -> None:
    out = tmp_path / "silent"
    with tracking_server.silent() as uri:
        began = time.time()
        said = ended(start(out, uri))
        with Ledger(out / "ledger.db") as ledger:
            after = time.time() - ledger.ran()[-1].ended
    assert len(WARNING.findall(said)) == 1, said
    assert time.time() - began < 120
    print(f"{after:.1f} s from the last sample to the end")
    assert after < 45  # the try under way and a last one, 10 s each, and the figures
    check_not_held_up(out)
    ended(start(out, server.uri))
    check_whole(server.uri, out)


@pytest.mark.skipif(
    bool(tracking_server.lacking_for_postgres()), reason=tracking_server.lacking_for_postgres()
)
def test_two_launches_into_one_server_on_postgresql(tmp_path: Path) -> None:
    with tracking_server.postgres() as store:
        server = Server(tmp_path, store)
        try:
            server.start()
            outs = [tmp_path / "first" / "shared", tmp_path / "second" / "shared"]
            few = "grid.seed=[0,1,2]"
            sweeps = [start(out, server.uri, few, seconds=0.05) for out in outs]
            assert "results are safe" not in "".join(map(ended, sweeps))
            before = held(server.uri, "shared")
            kinds = Counter(run.data.tags["quest.kind"] for run in before)
            assert kinds == {"point": 2 * 9, "curve": 2 * 6, "sweep": 2}
            origins = {run.data.tags["quest.origin"] for run in before}
            assert len(origins) == 2
            ended(start(outs[0], server.uri, few))
            assert {run.info.run_id for run in held(server.uri, "shared")} == {
                run.info.run_id for run in before
            }
            client = mlflow_store.connect(server.uri)
            for run in before:
                for name, value in run.data.metrics.items():
                    history = client.get_metric_history(run.info.run_id, name)
                    assert len({metric.step for metric in history}) == len(history)
                    assert history[-1].value == value
            (top, _) = [run for run in before if run.data.tags["quest.kind"] == "sweep"]
            kept = client.download_artifacts(top.info.run_id, "points.csv", str(tmp_path))
            assert len(Path(kept).read_text().splitlines()) == 1 + 9
            assert (tmp_path / "artifacts").is_dir()  # the server's, not a driver's
        finally:
            server.kill()
