"""By default nothing that a sweep starts, or tells people to start, is reached from elsewhere."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sockets import beyond_loopback, listening, processes

from quest_dist.folders import PACKAGE
from quest_dist.ledger import Ledger
from quest_dist.tracker import Sweep, Tracker

TESTS = Path(__file__).parent
TOKEN = "hf_plantedForRayToLeak"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="sockets are read from /proc")


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder of a short name: Ray's sockets allow about 100 characters."""
    folder = Path(tempfile.mkdtemp(prefix="q-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def environment(**changes: str) -> dict[str, str]:
    """This process's, less what names a cluster or a store."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
    return {**kept, "PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), str(TESTS)]), **changes}


def wait(until: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not until():
        assert process.poll() is None, "it ended early"
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.2)


def end(process: subprocess.Popen[bytes], others: set[int]) -> None:
    process.kill()
    process.wait()
    for pid in others:
        try:
            os.kill(pid, signal.SIGKILL)
        except OSError:
            continue


def held(folder: Path, secret: str) -> list[Path]:
    """Files below a folder that hold a text."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return [path for path in files if secret.encode() in path.read_bytes()]


def test_a_socket_on_every_interface_is_seen() -> None:
    with (
        socket.create_server(("0.0.0.0", 0)) as wide,
        socket.create_server(("127.0.0.1", 0)) as own,
    ):
        found = listening({os.getpid()})
        assert {wide.getsockname()[1], own.getsockname()[1]} <= {port for _, port in found}
        assert [port for _, port in beyond_loopback(found)] == [wide.getsockname()[1]]


@pytest.mark.slow
def test_a_private_cluster_listens_on_loopback_and_logs_no_secret(
    short: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    command = [sys.executable, str(TESTS / "tiny_sweep.py"), str(tmp_path / "out"), "cluster=local"]
    process = subprocess.Popen(
        [*command, "cluster.workers=1"],
        env=environment(
            RAY_TMPDIR=str(short), TINY_LOG=str(log), TINY_SECONDS="0.5", HF_TOKEN=TOKEN
        ),
    )
    others: set[int] = set()
    try:
        wait(log.exists, process)
        others = processes(str(short), process.pid)
        found = listening(others)
        assert process.wait(120) == 0
    finally:
        end(process, others)
    assert len(found) >= 3, "a head, a node and a worker at the least"
    assert beyond_loopback(found) == []
    assert list(short.rglob("raylet.out")), "these are the logs of that cluster"
    assert held(short, TOKEN) == []
    assert held(tmp_path, TOKEN) == []


@pytest.mark.slow
def test_a_cluster_that_was_attached_to_logs_no_secret_and_its_workers_have_it(
    short: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"127.0.0.1:{port}"
    head = ["ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}"]
    head += ["--num-cpus=1", "--include-dashboard=false", f"--temp-dir={short}"]
    running = environment(RAY_AUTH_MODE="disabled", RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0")
    ray = Path(sys.executable).with_name("ray")
    process = subprocess.Popen([str(ray), *head[1:]], env=running, stdout=subprocess.DEVNULL)
    others: set[int] = set()
    try:
        wait(lambda: any("raylet.out" in p.name for p in short.rglob("raylet.out")), process)
        command = [sys.executable, str(TESTS / "tiny_sweep.py"), str(tmp_path / "out")]
        command += ["cluster=ray", f"cluster.address={address}", "cluster.cpus_per_worker=1"]
        command += ["+cluster.env.SERVICE_PASSWORD=plantedByConfig", f"+cluster.env.TINY_LOG={log}"]
        command += ["+cluster.env.TINY_SEES=HF_TOKEN"]
        done = subprocess.run(
            command, env={**running, "HF_TOKEN": TOKEN}, capture_output=True, timeout=150
        )
        assert done.returncode == 0, done.stdout + done.stderr
        others = processes(str(short), process.pid)
    finally:
        end(process, others)
    assert log.read_text().split()[-1] == str(len(TOKEN)), "a worker has the token"
    assert held(short, TOKEN) == []
    assert held(short, "plantedByConfig") == []
    assert held(tmp_path, TOKEN) == []


@pytest.mark.slow
def test_the_command_that_shows_mlflow_serves_loopback_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with Ledger(tmp_path / "ledger.db") as ledger:
        tracker = Tracker({}, tmp_path, Sweep("shown"), ledger)
        assert tracker.sync([])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    _, *arguments = shlex.split(tracker.command())
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", *arguments, "--port", str(port)],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    others: set[int] = set()
    try:

        def up() -> bool:
            return port in {p for _, p in listening(processes("", process.pid))}

        wait(up, process)
        others = processes("", process.pid)
        found = listening(others)
    finally:
        end(process, others)
    assert ("127.0.0.1", port) in found
    assert beyond_loopback(found) == []
