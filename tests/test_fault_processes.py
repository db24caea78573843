"""Processes of a sweep on Ray that die or are asked to stop: one of each, looked at closely.

`python -m tests.chaos` kills many, at random.
"""

from __future__ import annotations

import signal
import subprocess
import sys
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


ENDS_WHILE_A_THREAD_COLLECTS = """
import gc, sys, threading
from pathlib import Path
import ray
from quest_dist.cluster import Cluster
from quest_dist.schedule_ray import Tuned

gc.set_threshold(700)
with Tuned(Cluster(), Path(sys.argv[1]), "", 1):
    references, ended = [ray.put(0) for _ in range(20_000)], threading.Event()

    def work():
        while not ended.is_set():
            if references:
                cycle = [references.pop()]
                cycle.append(cycle)
            made = [[] for _ in range(30)]

    thread = threading.Thread(target=work)
    thread.start()
ended.set()
thread.join()
print("outlived it")
"""


@pytest.mark.slow
def test_ray_is_left_while_another_thread_frees_what_was_its(tmp_path: Path) -> None:
    """The thread that copies to MLflow may be the one that collects Tune's garbage; done between
    two steps of Ray's shutdown, that would end the driver without a word and without a table."""
    done = subprocess.run(
        [sys.executable, "-c", ENDS_WHILE_A_THREAD_COLLECTS, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "outlived it\n"), done.stderr
