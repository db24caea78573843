"""Times run alone: nothing else of the sweep runs meanwhile, whatever came before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from itertools import combinations
from pathlib import Path
from typing import Any

import beating_unit
import pytest
import tiny_sweep
from beating_unit import Beats

from quest_dist import cluster
from quest_dist.ledger import Ledger, Ran
from quest_dist.prepare import prepare
from quest_dist.work import Work

TWO = ("cluster=local", "cluster.workers=2")


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BEAT_LOG", str(tmp_path / "beats"))
    monkeypatch.setenv("BEAT_SECONDS", "0.3")
    return tmp_path / "beats"


def ran(out: Path) -> list[Ran]:
    with Ledger(out / "ledger.db") as ledger:
        return ledger.ran()


def together(found: list[Ran]) -> set[tuple[bool, ...]]:
    """Which kinds were on one machine at one time: (True, True) is two times beside each other."""
    return {
        tuple(sorted((one.alone, other.alone)))
        for one, other in combinations(found, 2)
        if one.host == other.host and one.started < other.ended and other.started < one.ended
    }


def beside(found: list[Beats]) -> set[tuple[bool, ...]]:
    """The same, by the heartbeats: also of samples that no driver ever heard of."""
    return {
        tuple(sorted((one.timed, other.timed)))
        for one, other in combinations(found, 2)
        if one.first < other.last and other.first < one.last
    }


def start(program: str, out: Path, *overrides: str, **env: str) -> subprocess.Popen[bytes]:
    here = Path(__file__).parent
    path = {"PYTHONPATH": os.pathsep.join([str(here.parent), str(here), *sys.path[1:]])}
    command = [sys.executable, str(here / program), str(out), *overrides]
    return subprocess.Popen(command, env=os.environ | path | env, stdout=subprocess.DEVNULL)


@pytest.mark.slow
def test_times_run_alone_after_all_rungs_of_a_search(tmp_path: Path, log: Path) -> None:
    search = ("search.delta=15", "search.first_samples=8", "task.passkey.samples=40")
    assert beating_unit.sweep(tmp_path / "out", [*TWO, *search]) == 0
    found = ran(tmp_path / "out")
    accuracy = [each for each in found if not each.alone]
    assert len(accuracy) > 8  # it asked again
    assert len(found) - len(accuracy) == 6
    assert together(found) == beside(beating_unit.beats(log)) == {(False, False)}
    assert len({each.process for each in accuracy}) >= 2
    assert {(each.host, each.device) for each in found} == {(os.uname().nodename, "cpu")}
    assert max(each.ended for each in accuracy) <= min(e.started for e in found if e.alone)


@pytest.mark.slow
def test_a_killed_driver_leaves_no_worker_beside_the_times(tmp_path: Path, log: Path) -> None:
    out = tmp_path / "out"
    driver = start("beating_unit.py", out, *TWO, BEAT_SECONDS="20")
    ends = time.monotonic() + 90
    while not log.exists() or len({each.process for each in beating_unit.beats(log)}) < 2:
        assert time.monotonic() < ends, "no worker started"
        time.sleep(0.05)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    killed = {each.process for each in beating_unit.beats(log)}
    # The same command at once, without what is left of the accuracy: its times come first.
    assert beating_unit.sweep(out, [*TWO, "limit=2", "grid.task=[kernels_512,kernels_1k]"]) == 0
    assert beating_unit.sweep(out, [*TWO, "limit=2"]) == 0
    found = beating_unit.beats(log)
    assert {each.process for each in found if each.timed}.isdisjoint(killed)
    assert (False, True) not in beside(found)
    assert (True, True) not in beside(found)
    assert together(ran(out)) <= {(False, False)}


@pytest.mark.slow
def test_on_a_cluster_with_room_for_more_times_still_go_one_by_one(
    tmp_path: Path, log: Path
) -> None:
    sweep = start("two_nodes.py", tmp_path / "out")
    assert sweep.wait(timeout=150) == 0
    found = ran(tmp_path / "out")
    assert len([each for each in found if each.alone]) == 6
    assert together(found) == beside(beating_unit.beats(log)) == {(False, False)}


def test_times_share_their_gpu_with_nobody(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(cluster, "available_gpus", lambda: 2)
    monkeypatch.setattr(cluster, "lacking_for_gpus", lambda: "")
    half = ("cluster=local", "cluster.gpus_per_worker=0.5", "cluster.check_memory=false")
    sweep = prepare(tiny_sweep.config(tmp_path / "out", [*beating_unit.MIXED, *half]))
    work = Work.of(sweep, None)
    assert (work.workers.gpus, work.one.gpus, work.one.count) == (0.5, 1.0, 1)


def test_the_ledger_says_when_and_where(tmp_path: Path, log: Path) -> None:
    before = time.time()
    assert beating_unit.sweep(tmp_path / "out", ["limit=1"]) == 0
    found = ran(tmp_path / "out")
    assert [(each.alone, each.sample) for each in found] == [(False, 0), *[(True, 0)] * 3]
    assert {(each.process, each.device) for each in found} == {(os.getpid(), "cpu")}
    assert all(0.3 <= each.ended - each.started < 5 for each in found)
    assert before <= found[0].started < found[-1].ended <= time.time()
