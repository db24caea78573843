"""MLflow may die at any moment: the sweep goes on, and the same command adds what it missed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny_sweep
from processes import TESTS, Launch, until
from tiny_unit import begun

from quest_dist import mlflow_store
from quest_dist.ledger import Ledger
from quest_dist.tracker import Sweep, Tracker

GRID = ("tracking=mlflow", "grid.seed=[0,1,2]")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Starts a real server on loopback, on SQLite; again on the same port and store."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    started: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
        command += ["--port", str(port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db"]
        command += ["--artifacts-destination", str(tmp_path / "artifacts")]
        env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (tmp_path / "server.log").open("a") as log:
            started.append(
                subprocess.Popen(
                    command, env=env, stdout=log, stderr=log, cwd=tmp_path, start_new_session=True
                )
            )
        until(lambda: _answers(port), 90, "the MLflow server did not start")
        return started[-1]

    start.uri = f"http://127.0.0.1:{port}"  # type: ignore[attr-defined]
    yield start
    for process in started:
        if process.poll() is None:
            stop(process)


def stop(server: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the server and its worker."""
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


@pytest.mark.slow
def test_a_killed_server_holds_up_nothing_and_catches_up(
    tmp_path: Path, server: Callable[[], subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = server.uri  # type: ignore[attr-defined]
    first = server()
    out, said, log = tmp_path / "outputs", tmp_path / "said", tmp_path / "log"
    given = (*GRID, f"tracking.uri={uri}")
    launch = Launch(out, said, *given, TINY_SECONDS="0.5", TINY_LOG=str(log))
    client = mlflow_store.connect(uri)
    until(lambda: client.get_experiment_by_name("quest_dist/tiny"), 60, "nothing reached MLflow")
    stop(first)
    killed_at = time.time()
    assert launch.status() == 0
    assert [s for s in begun(log) if s.at > killed_at], "the server was killed too late"
    text = said.read_text()
    assert "results are safe; the next sync adds them" in text
    assert "Traceback" not in text
    server()
    log.unlink()
    assert tiny_sweep.run(out, *given) == 0
    assert begun(log) == []
    experiment = client.get_experiment_by_name("quest_dist/tiny")
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    logged = Counter(r.data.tags["quest.key"] for r in runs if r.data.tags["quest.kind"] == "point")
    assert logged == Counter(point.key for point in tiny_sweep.points(out, *GRID))


@pytest.mark.slow
def test_a_kill_while_mlflow_makes_its_tables_leaves_no_half_of_them(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    code = "import sys; from pathlib import Path; from quest_dist import mlflow_store\n"
    code += "mlflow_store.create(Path(sys.argv[1]))"
    env = {**os.environ, "PYTHONPATH": str(TESTS.parent)}
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], env=env)
    made = tmp_path / ".mlflow.db.new" / "mlflow.db"
    until(lambda: made.exists() and made.stat().st_size > 50_000, 60, "no table was made")
    process.kill()
    process.wait()
    assert not path.exists()
    with Ledger(tmp_path / "ledger.db") as ledger:
        tracker = Tracker({}, tmp_path, Sweep("tiny"), ledger)
        assert tracker.sync([])
    assert path.exists()
    assert not made.parent.exists()
