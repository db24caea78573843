"""What kind of node each unit goes to: where it fits, long ones to fast nodes, and back if lost."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny_sweep

from quest_dist import node_types
from quest_dist.cluster import Cluster, check, worker_memory
from quest_dist.folders import PACKAGE
from quest_dist.node_types import GIB, Dealer, Load, NodeType
from quest_dist.plan import Unit

FAST, SLOW = NodeType("fast", speed=4.0), NodeType("slow")
ONE_EACH = {"fast": 1, "slow": 1}


class Clock:
    """Stands still until it is set."""

    def __init__(self) -> None:
        self.at = 0.0

    def __call__(self) -> float:
        return self.at


def loads(*seconds: float, size: int = 0, model: int = 0) -> list[Load]:
    return [Load(f"{model}.{i}", each, size, model) for i, each in enumerate(seconds)]


def dealt(dealer: Dealer, alive: Mapping[str, int]) -> list[tuple[str, str]]:
    """All that is dealt now, as (unit, kind)."""
    found = []
    while (one := dealer.deal(alive)) is not None:
        found.append((one[0].key, one[1]))
    return found


def finished(
    dealer: Dealer, clock: Clock, alive: Mapping[str, int]
) -> dict[str, tuple[str, float]]:
    """Run all loads as the kinds really would; unit -> (kind, end)."""
    speeds = {name: kind.speed for name, kind in dealer.types.items()}
    running: dict[str, tuple[str, float]] = {}
    waiting: list[tuple[str, str]] = []
    sizes = {load.key: load.seconds for load in dealer.left}
    ends: dict[str, tuple[str, float]] = {}
    while dealer.left or running or waiting:
        waiting += dealt(dealer, alive)
        for key, kind in list(waiting):
            if sum(k == kind for k, _ in running.values()) < alive[kind]:
                waiting.remove((key, kind))
                running[key] = kind, clock.at + sizes[key] / speeds[kind]
                dealer.began(key)
        key = min(running, key=lambda key: running[key][1])
        ends[key] = running.pop(key)
        clock.at = ends[key][1]
        dealer.ended(key)
    return ends


def test_long_units_go_to_fast_nodes_and_none_holds_up_the_end() -> None:
    clock = Clock()
    dealer = Dealer({"slow": SLOW, "fast": FAST}, loads(8, 8, 8, 2, 1, 1), now=clock)
    ends = finished(dealer, clock, ONE_EACH)
    assert {key for key, (kind, _) in ends.items() if kind == "fast"} >= {"0.0", "0.1", "0.2"}
    # All on the fast one is 7 s, and 28 s / (4 + 1) is the least that any order takes.
    assert 28 / 5 <= max(end for _, end in ends.values()) <= 6.5


def test_equal_nodes_share_equal_units() -> None:
    clock = Clock()
    types = {"one": NodeType("one"), "other": NodeType("other")}
    ends = finished(Dealer(types, loads(*[1] * 8), now=clock), clock, {"one": 1, "other": 3})
    assert max(end for _, end in ends.values()) == 2
    assert sum(kind == "other" for kind, _ in ends.values()) == 6


def test_a_unit_goes_only_where_its_memory_fits() -> None:
    types = {"fast": NodeType("fast", 9.0, memory_gib=16), "slow": NodeType("slow", 1.0, 80)}
    left = [Load("large", 9, 40 * GIB, 0), Load("small", 9, GIB, 0), Load("huge", 1, 90 * GIB, 0)]
    dealer = Dealer(types, left)
    assert [load.key for load in dealer.homeless(ONE_EACH)] == ["huge"]
    assert {load.key for load in dealer.homeless({"fast": 1, "slow": 0})} == {"large", "huge"}
    assert dict(dealt(dealer, ONE_EACH)) == {"small": "fast", "large": "slow"}
    assert [load.key for load in dealer.left] == ["huge"]
    # Half a GPU holds half of it.
    assert node_types.room(types["slow"], 0.5) == 40 * GIB
    assert node_types.largest(types, 0.0) == 80 * GIB
    assert node_types.largest({**types, "new": NodeType("new")}, 0.0) is None


def test_at_most_one_unit_a_place_waits() -> None:
    dealer = Dealer({"fast": FAST, "slow": SLOW}, loads(*[1.0] * 50))
    kinds = [kind for _, kind in dealt(dealer, {"fast": 2, "slow": 3})]
    assert (kinds.count("fast"), kinds.count("slow")) == (4, 6)
    one = Dealer({"fast": FAST, "slow": SLOW}, loads(*[1.0] * 5), at_once=1)
    assert dealt(one, ONE_EACH) == [("0.0", "fast")]
    one.ended("0.0")
    assert dealt(one, ONE_EACH) == [("0.1", "fast")]


def test_a_worker_keeps_to_the_model_that_it_has_loaded() -> None:
    left = loads(2, 2, 2) + loads(2, 2, 2, model=1)
    dealer = Dealer({"slow": SLOW}, left[::3] + left[1::3] + left[2::3])  # in turn
    order = [dealer.deal({"slow": 1})]
    while (load := order[-1]) is not None:
        dealer.began(load[0].key)
        order.append(dealer.deal({"slow": 1}))
        dealer.ended(load[0].key)
    assert [each[0].key for each in order if each] == ["0.0", "0.1", "0.2", "1.0", "1.1", "1.2"]


def test_what_waits_for_lost_nodes_is_dealt_again() -> None:
    dealer = Dealer({"fast": FAST, "slow": SLOW}, loads(4, 4, 4, 4, 1))
    assert dict(dealt(dealer, ONE_EACH))["0.0"] == "fast"
    dealer.began("0.0")
    assert list(dealer.stranded(ONE_EACH)) == []
    alone = {"fast": 0, "slow": 1}
    (waits,) = dealer.stranded(alone)
    assert waits != "0.0"  # its worker is to say what becomes of it
    dealer.take_back(waits)
    assert dealer.left[0].key == waits
    for key in [key for key, each in dealer._bound.items() if each.kind == "slow"]:
        dealer.ended(key)
    assert dealt(dealer, alone)[0] == (waits, "slow")


def test_what_no_living_node_can_hold_waits_for_one_that_can() -> None:
    types = {"small": NodeType("small", 1.0, 8), "big": NodeType("big", 2.0, 80)}
    dealer = Dealer(types, [Load("large", 1, 40 * GIB, 0), Load("small", 1, 1, 0)])
    gone = {"small": 1, "big": 0}
    assert dealt(dealer, gone) == [("small", "small")]
    dealer.ended("small")
    assert dealt(dealer, gone) == [("large", "big")]
    assert list(dealer.stranded(gone)) == []


def test_places_are_what_a_workers_needs_leave_of_each_node() -> None:
    types = {"fast": FAST, "slow": SLOW}
    nodes = [
        {"CPU": 8.0, "GPU": 2.0, "fast": 1.0},
        {"CPU": 3.0, "GPU": 1.0, "fast": 1.0},
        {"CPU": 64.0, "GPU": 8.0},
    ]
    assert node_types.places(types, {"CPU": 4.0, "GPU": 0.5}, nodes) == {"fast": 2, "slow": 0}
    assert node_types.places(types, {"CPU": 0.1}, nodes[1:]) == {"fast": 30, "slow": 0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"big": {"speed": 2}}, r"cluster.node_types.big.resource is empty"),
        ({"big": 3}, r"cluster.node_types.big=3: give it resource, speed, memory_gib"),
        ({"big": {"resource": "GPU"}}, r"node_types.big.resource=GPU: nodes of every type"),
        ({"big": {"resource": "b", "sped": 2}}, r"big.sped: no such setting; did you mean 'speed'"),
        ({"big": {"resource": "b", "speed": 0}}, r"node_types.big.speed=0: must be a number above"),
        ({"big": {"resource": "b", "memory_gib": "x"}}, r"big.memory_gib='x': must be a number"),
        ({"a": {"resource": "b"}, "c": {"resource": "b"}}, r"2 of them have the resource b"),
    ],
)
def test_wrong_types_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(Cluster(address="auto", node_types=settings))


def test_one_machine_has_no_types() -> None:
    with pytest.raises(ValueError, match=r"cluster.node_types: one machine has one type"):
        check(Cluster(node_types={"big": {"resource": "b"}}))


def test_the_largest_type_is_what_a_worker_can_have() -> None:
    types = {"a": {"resource": "a", "memory_gib": 16}, "b": {"resource": "b", "memory_gib": 80}}
    attached = Cluster(address="auto", node_types=types, gpus_per_worker=0.5)
    assert worker_memory(attached) == 40 * GIB
    assert worker_memory(Cluster(address="auto")) is None


def test_nodes_are_asked_for_what_units_name_by_path(tmp_path: Path) -> None:
    from quest_dist.schedule_ray_nodes import paths

    unit = Unit(tiny_sweep.points(tmp_path / "out"), (0,))
    assert paths([unit]) == [str(tmp_path / "tiny_model")]


def test_a_place_is_the_names_and_sizes_of_its_files(tmp_path: Path) -> None:
    from quest_dist.schedule_ray_nodes import seen

    one, same = tmp_path / "one", tmp_path / "same"
    for folder in (one, same):
        (folder / "deep").mkdir(parents=True)
        (folder / "deep" / "a").write_text("12")
        (folder / "b").write_text("123")
    names = [str(one), str(same), str(one / "b"), str(tmp_path / "nothing")]
    found = seen(names)
    assert found[names[0]] == found[names[1]] != found[names[2]]
    assert found[names[3]] is None
    (same / "deep" / "a").write_text("1")
    assert seen(names)[names[1]] != found[names[1]]


def test_other_code_has_other_digits(tmp_path: Path) -> None:
    from quest_dist.schedule_ray_nodes import digest_of_code

    (tmp_path / "one.py").write_text("1")
    before = digest_of_code(tmp_path)
    (tmp_path / "data.json").write_text("1")
    assert digest_of_code(tmp_path) == before
    (tmp_path / "one.py").write_text("2")
    assert digest_of_code(tmp_path) != before
    assert digest_of_code() == digest_of_code(PACKAGE)
