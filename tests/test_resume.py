"""Continuing, retrying and widening are one path: the same command runs what the ledger lacks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_sweep
from tiny_unit import started


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TINY_LOG", str(tmp_path / "log"))
    return tmp_path / "log"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "outputs"


def start(out: Path, *overrides: str) -> subprocess.Popen[str]:
    here = Path(__file__).parent
    env = os.environ | {"PYTHONPATH": f"{here.parent}{os.pathsep}{here}"}
    command = [sys.executable, str(here / "tiny_sweep.py"), str(out), *overrides]
    return subprocess.Popen(
        command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def wait_for(log: Path, samples: int) -> None:
    deadline = time.monotonic() + 60
    while len(started(log)) < samples:
        assert time.monotonic() < deadline, "the sweep did not start"
        time.sleep(0.02)


def test_a_second_launch_has_nothing_to_do_and_says_the_same(out: Path, log: Path) -> None:
    assert tiny_sweep.run(out) == 0
    first = tiny_sweep.table(out)
    assert len(started(log)) == 6
    assert tiny_sweep.run(out) == 0
    assert len(started(log)) == 6
    assert tiny_sweep.table(out) == first


def test_a_killed_sweep_continues_without_repeating_or_losing_a_sample(
    out: Path, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINY_SECONDS", "0.3")
    process = start(out)
    wait_for(log, 4)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    monkeypatch.setenv("TINY_SECONDS", "0")
    done = tiny_sweep.contents(out, tiny_sweep.points(out))
    kept = {r["sample"] for r in next(iter(done.values()))}
    assert 0 < len(kept) < 6
    log.unlink()
    assert tiny_sweep.run(out) == 0
    assert {sample for _, sample, _ in started(log)} == set(range(6)) - kept
    whole = tmp_path / "whole"
    assert tiny_sweep.run(whole) == 0
    assert tiny_sweep.table(out) == tiny_sweep.table(whole)


def test_an_interrupted_sweep_stops_cleanly_and_says_how_to_go_on(
    out: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINY_SECONDS", "0.3")
    process = start(out)
    wait_for(log, 3)
    process.send_signal(signal.SIGINT)
    text, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "the same command again goes on" in text
    assert "Traceback" not in errors


def test_two_sweeps_cannot_write_in_one_place(
    out: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINY_SECONDS", "5")
    process = start(out)
    try:
        wait_for(log, 1)
        with pytest.raises(ValueError, match=f"another sweep .*process {process.pid}"):
            tiny_sweep.run(out)
    finally:
        process.kill()
        process.communicate()


def test_a_wider_grid_runs_only_what_is_new(out: Path, log: Path) -> None:
    tiny_sweep.run(out)
    log.unlink()
    assert tiny_sweep.run(out, "grid.budget=[64,128,256]") == 0
    assert sorted(started(log)) == [("passkey", sample, 1) for sample in range(6)]
    log.unlink()
    assert tiny_sweep.run(out, "task.passkey.samples=8") == 0
    assert sorted(started(log)) == [("passkey", sample, 3) for sample in (6, 7)]


def test_a_lower_limit_reads_fewer_samples(out: Path, log: Path) -> None:
    assert tiny_sweep.run(out, "limit=2") == 0
    assert len(started(log)) == 2
    assert tiny_sweep.run(out, "limit=3") == 0
    assert len(started(log)) == 3


def test_failed_samples_are_tried_again(
    out: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINY_ERROR_AT", "2")
    assert tiny_sweep.run(out) == 1
    assert "failed" in tiny_sweep.table(out)
    monkeypatch.delenv("TINY_ERROR_AT")
    log.unlink()
    assert tiny_sweep.run(out) == 0
    assert [sample for _, sample, _ in started(log)] == [2]
    assert "failed" not in tiny_sweep.table(out)


def test_what_no_worker_could_run_is_a_failure_of_its_points(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINY_RAISE_AT", "5")
    assert tiny_sweep.run(out) == 1
    records = tiny_sweep.contents(out, tiny_sweep.points(out))
    assert all({r["sample"] for r in found} == set(range(5)) for found in records.values())
    assert "RuntimeError: broken on purpose" in tiny_sweep.table(out)


@pytest.mark.slow
def test_ray_and_inline_write_the_same_table(out: Path, tmp_path: Path) -> None:
    assert tiny_sweep.run(out) == 0
    other = tmp_path / "ray"
    assert tiny_sweep.run(other, "cluster=local", "cluster.workers=2") == 0
    assert tiny_sweep.table(other) == tiny_sweep.table(out)
