"""Processes of a sweep on Ray that die or are asked to stop: one of each, looked at closely.

`python -m tests.chaos` kills many, at random.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import tiny_sweep
from processes import Launch, kill, until
from tiny_unit import begun

RAY = ("cluster=local", "cluster.workers=2")


@pytest.mark.slow
def test_a_killed_worker_is_replaced_even_where_units_are_short(tmp_path: Path) -> None:
    """Without care Ray Tune hands the unit that a new worker starts for to the one that is left."""
    log, said, out = tmp_path / "log", tmp_path / "said", tmp_path / "outputs"
    given = (*RAY, "task.passkey.samples=60", "cluster.samples_per_unit=1")
    launch = Launch(out, said, *given, TINY_SECONDS="0.5", TINY_LOG=str(log))
    try:
        until(lambda: len({s.pid for s in begun(log)}) == 2, 90, "two workers did not start")
        old = {s.pid for s in begun(log)}
        killed = begun(log)[-1].pid
        assert kill(killed)
        assert launch.status() == 0, said.read_text()
    finally:
        launch.kill()
    began = begun(log)
    assert len(began) <= 60 + 1  # the sample that the worker was at is begun again
    new = [s for s in began if s.pid not in old]
    assert len(new) > 5, "the worker was not replaced"
    whole = tmp_path / "whole"
    assert tiny_sweep.run(whole, "task.passkey.samples=60") == 0
    assert tiny_sweep.table(out) == tiny_sweep.table(whole)


@pytest.mark.slow
@pytest.mark.parametrize("asked", [signal.SIGINT, signal.SIGTERM])
def test_a_sweep_that_was_asked_to_stop_is_not_called_finished(
    tmp_path: Path, asked: signal.Signals
) -> None:
    """Tune's fit() returns from an interrupt as if all had gone well."""
    log, said, out = tmp_path / "log", tmp_path / "said", tmp_path / "outputs"
    launch = Launch(out, said, *RAY, TINY_SECONDS="1", TINY_LOG=str(log))
    try:
        until(lambda: len(begun(log)) >= 3, 90, "the sweep did not start")
        launch.driver.send_signal(asked)
        assert launch.status(60) == 1
        until(lambda: not launch.processes(), 60, "processes are left")
    finally:
        launch.kill()
    text = said.read_text()
    assert "Traceback" not in text
    assert "the same command again goes on from here" in text
    kept = {
        r["sample"] for r in next(iter(tiny_sweep.contents(out, tiny_sweep.points(out)).values()))
    }
    assert 0 < len(kept) < 6
    assert tiny_sweep.run(out) == 0


@pytest.mark.slow
def test_a_killed_raylet_ends_the_driver_which_says_so(tmp_path: Path) -> None:
    """Its zombie is alive to Ray, and fit() would wait for ever."""
    log, said, out = tmp_path / "log", tmp_path / "said", tmp_path / "outputs"
    launch = Launch(out, said, *RAY, TINY_SECONDS="1", TINY_LOG=str(log))
    try:
        until(lambda: len(begun(log)) >= 3, 90, "the sweep did not start")
        (raylet,) = launch.processes("raylet")
        assert kill(raylet.pid)
        assert launch.status(30) == 1
        until(lambda: not launch.processes("worker"), 30, "workers are left")
    finally:
        launch.kill()
    assert "error: Ray's raylet died" in said.read_text()
    kept = tiny_sweep.contents(out, tiny_sweep.points(out))
    assert all(len(records) > 0 for records in kept.values())
    assert tiny_sweep.run(out) == 0
