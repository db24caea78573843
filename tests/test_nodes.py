"""A cluster of several raylets: nodes are lost, join, differ, and are refused with the reason.

One cluster serves all tests of this file, each with nodes of its own.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import tiny_sweep
from node_unit import SHAPE, Begun, begun
from processes import Launch, until
from raylets import Raylets

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="processes are read from /proc"),
]
ONE_LENGTH = ("grid.task=[passkey]", "task.passkey.length=1000")
TWO_LENGTHS = (
    "grid.task=[passkey,passkey_long]",
    *("task.passkey.length=1000", "task.passkey_long.length=8000"),
    f"+model.tiny.shape={SHAPE}",
)


@pytest.fixture(scope="module")
def raylets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Raylets]:
    with Raylets(tmp_path_factory.mktemp("cluster") / "said") as cluster:
        yield cluster


class Sweep(NamedTuple):
    """A launch on the cluster, with what its units logged and its output folder."""

    launch: Launch
    log: Path
    out: Path

    @property
    def begun(self) -> list[Begun]:
        return begun(self.log)

    @property
    def said(self) -> str:
        return self.launch.said.read_text()


def start(raylets: Raylets, folder: Path, *overrides: str, seconds: float = 0.5) -> Sweep:
    folder.mkdir(exist_ok=True)
    log, out = folder / "log", folder / "outputs"
    place = (
        *("cluster=ray", f"cluster.address='{raylets.address}'", "cluster.cpus_per_worker=1"),
        *("cluster.samples_per_unit=1", f"+cluster.env.NODE_LOG={log}"),
        f"+cluster.env.NODE_SECONDS='{seconds}'",
    )
    given = (*place, *overrides)
    return Sweep(Launch(out, folder / "said", *given, program="node_unit.py"), log, out)


def on(found: list[Begun], node: str) -> list[Begun]:
    return [each for each in found if each.node == node]


def test_a_node_is_lost_and_another_joins(raylets: Raylets, tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    raylets.add("stays", NODE_HOLD=str(hold))
    raylets.add("dies", NODE_HOLD=str(hold))
    samples = "task.passkey.samples=20"
    sweep = start(raylets, tmp_path, *ONE_LENGTH, samples)
    try:
        until(lambda: on(sweep.begun, "stays") and on(sweep.begun, "dies"), 90, sweep.said)
        assert raylets.kill("dies") > 1, "the raylet and a worker"
        killed = time.time()
        lost = on(sweep.begun, "dies")
        address = raylets.add("joins", apart=True)
        until(lambda: len(on(sweep.begun, "joins")) > 2, 60, "the new node got no units")
        hold.touch()
        assert sweep.launch.status() == 0, sweep.said
    finally:
        sweep.launch.kill()
        raylets.kill("stays")
        raylets.kill("joins")
    times = Counter(each.sample for each in sweep.begun)
    assert set(times) == set(range(20))
    # What the lost worker was at is begun once more, and nothing else.
    assert {sample for sample, n in times.items() if n > 1} <= {lost[-1].sample}
    assert max(times.values()) <= 2
    whole = tmp_path / "whole"
    assert tiny_sweep.run(whole, *ONE_LENGTH, samples) == 0
    assert tiny_sweep.table(sweep.out) == tiny_sweep.table(whole)
    after = [each for each in sweep.begun if each.sample == lost[-1].sample][1:]
    print(
        f"joined at {address}; begun again {[each.at - killed for each in after]} s after the loss"
    )


def test_long_units_go_to_the_fast_node_and_large_ones_where_they_fit(
    raylets: Raylets, tmp_path: Path
) -> None:
    hold = tmp_path / "hold"  # until the slow one has begun, too
    raylets.add("quick", {"CPU": 1, "fast": 1}, NODE_SPEED="4", NODE_HOLD=str(hold))
    raylets.add("large", {"CPU": 1, "roomy": 1})
    raylets.add("unnamed", {"CPU": 1})
    types = (
        "+cluster.node_types.fast={resource:fast,speed:4,memory_gib:40}",
        "+cluster.node_types.roomy={resource:roomy,speed:1,memory_gib:3}",
    )
    try:
        samples = ("task.passkey.samples=12", "task.passkey_long.samples=4")
        sweep = start(raylets, tmp_path, *TWO_LENGTHS, *samples, *types, seconds=0.25)
        until(lambda: on(sweep.begun, "large"), 90, sweep.said)
        hold.touch()
        assert sweep.launch.status() == 0, sweep.said
        sweep.launch.kill()
        found = sweep.begun
        assert len(found) == 12 + 4
        assert {each.node for each in found if each.task == "passkey_long"} == {"quick"}
        assert on(found, "quick")[0].task == "passkey_long"
        assert {each.node for each in found if each.task == "passkey"} == {"quick", "large"}
        assert on(found, "unnamed") == []
        # One process a node: with node types, too, a worker and its loaded model are kept.
        assert len({each.pid for each in found}) == 2
    finally:
        for name in ("quick", "large", "unnamed"):
            raylets.kill(name)


def test_units_that_wait_for_a_kind_of_node_that_is_lost_go_to_another(
    raylets: Raylets, tmp_path: Path
) -> None:
    raylets.add("first", {"CPU": 1, "fast": 1}, NODE_SPEED="4", NODE_HOLD=str(tmp_path / "never"))
    raylets.add("second", {"CPU": 1, "slow": 1}, NODE_SPEED="2")
    types = (
        "+cluster.node_types.fast={resource:fast,speed:4}",
        "+cluster.node_types.slow={resource:slow}",
    )
    sweep = start(raylets, tmp_path, *ONE_LENGTH, "task.passkey.samples=12", *types, seconds=0.8)
    try:
        until(lambda: on(sweep.begun, "first") and on(sweep.begun, "second"), 90, "start")
        raylets.kill("first")
        assert sweep.launch.status(60) == 0, sweep.said
    finally:
        sweep.launch.kill()
        raylets.kill("second")
    times = Counter(each.sample for each in sweep.begun)
    assert set(times) == set(range(12))
    assert sum(times.values()) <= 12 + 1


def test_what_fits_nowhere_is_refused_before_a_worker_starts(
    raylets: Raylets, tmp_path: Path
) -> None:
    raylets.add("small", {"CPU": 1, "slow": 1})
    declared = "+cluster.node_types.slow={resource:slow,memory_gib:3}"
    absent = "+cluster.node_types.huge={resource:huge,memory_gib:900}"
    try:
        none = start(raylets, tmp_path / "none", *TWO_LENGTHS, "grid.task=[passkey_long]", declared)
        assert none.launch.status() == 2
        some = start(raylets, tmp_path / "some", *TWO_LENGTHS, declared, absent, "limit=2")
        assert some.launch.status() == 1
    finally:
        raylets.kill("small")
    assert none.begun == [], "no worker has started"
    (line,) = [line for line in none.said.splitlines() if "error" in line]
    assert "passkey_long on tiny: needs" in line
    assert "the largest of cluster.node_types has 3.0" in line
    # Some go on, without those that only a kind of node could hold of which there is none.
    assert {each.task for each in some.begun} == {"passkey"}
    assert "the largest nodes here, slow, hold 3.0" in some.said


def test_a_node_that_does_not_see_the_model_is_named(raylets: Raylets, tmp_path: Path) -> None:
    # The model is the only thing there, so that hiding its folder hides nothing else.
    folder = tmp_path / "tiny_model"
    folder.mkdir()
    raylets.add("sees")
    try:
        address = raylets.add("blind", hides=folder)
    except PermissionError as error:
        raylets.kill("sees")
        pytest.skip(f"no mount namespaces: {error}")
    try:
        sweep = start(raylets, tmp_path, *ONE_LENGTH)
        assert sweep.launch.status() == 2
    finally:
        raylets.kill("sees")
        raylets.kill("blind")
    assert sweep.begun == []
    (line,) = [line for line in sweep.said.splitlines() if "error" in line]
    assert f"cluster: node {address} sees something else at {folder}, which units read" in line
    assert "mount the same disk there, or copy it to the same path" in line
