"""`ray job submit`: the sweep as a job on a running cluster, with Ray's own dashboard."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_sweep
from processes import TESTS, kill, until
from sockets import processes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="processes are read from /proc"),
]
pytest.importorskip(
    "ray.dashboard.optional_deps",
    reason="the dashboard is in ray[default], which quest_dist does not need",
    exc_type=ImportError,
)
RAY = (sys.executable, "-m", "ray.scripts.scripts")


@pytest.fixture
def dashboard() -> Iterator[str]:
    """The address of the dashboard of a cluster of one node, on loopback."""
    folder = Path(tempfile.mkdtemp(prefix="q-"))  # Ray's sockets allow about 100 characters
    ports = []
    with contextlib.ExitStack() as open_together:
        for _ in range(2):
            free = open_together.enter_context(socket.create_server(("127.0.0.1", 0)))
            ports.append(free.getsockname()[1])
    command = [*RAY, "start", "--head", "--block", "--num-cpus=1", f"--temp-dir={folder}"]
    command += ["--node-ip-address=127.0.0.1", f"--port={ports[0]}", "--disable-usage-stats"]
    command += ["--include-dashboard=true", f"--dashboard-port={ports[1]}"]
    head = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{ports[1]}"
    try:
        until(lambda: answers(ports[1]), 60, "the dashboard does not answer")
        yield address
    finally:
        others = processes(str(folder), head.pid)
        head.kill()
        head.wait()
        for pid in others:
            kill(pid)
        shutil.rmtree(folder, ignore_errors=True)


def environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
    own = {"RAY_AUTH_MODE": "disabled", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    return {**kept, **own, "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"}


def answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def test_a_sweep_runs_as_a_job_and_its_status_is_the_jobs(dashboard: str, tmp_path: Path) -> None:
    out = tmp_path / "outputs"
    job = [*RAY, "job", "submit", "--address", dashboard, "--"]
    job += [sys.executable, str(TESTS / "tiny_sweep.py"), str(out)]
    place = ["cluster=local", "cluster.cpus_per_worker=1"]  # attached to: Ray sets RAY_ADDRESS

    def submitted(*overrides: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*job, *place, *overrides],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=120,
        )

    done = submitted()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout
    assert tiny_sweep.run(tmp_path / "whole") == 0
    assert tiny_sweep.table(out) == tiny_sweep.table(tmp_path / "whole")
    wrong = submitted("grid.method=[nope]")
    assert wrong.returncode != 0
    assert "unknown method 'nope'" in wrong.stdout + wrong.stderr
