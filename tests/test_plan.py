"""Points are named by what can change their scores, and units cover what is missing, once."""

from __future__ import annotations

from dataclasses import replace

import grids
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quest_dist import plan
from quest_dist.plan import Point, Spec, Unit

PASSKEY = "quest_dist.tasks.passkey.Passkey"


def only(**lists: object) -> Point:
    (found,) = grids.points(**lists)  # type: ignore[arg-type]
    return found


def quest(**lists: object) -> Point:
    return only(method=["quest"], budget=[64], **lists)


def test_full_gives_one_point_and_others_one_a_budget() -> None:
    found = grids.points(budget=[64, 128, 256], method=["full", "quest", "h2o"])
    assert [(p.method.name, p.budget) for p in found[:4]] == [
        ("full", None),
        ("quest", 64),
        ("quest", 128),
        ("quest", 256),
    ]
    assert len(found) == 1 + 2 * 3


def test_full_alone_needs_no_budget() -> None:
    assert only(method=["full"], budget=[]).budget is None


def test_repeated_values_give_one_point() -> None:
    assert len(grids.points(budget=[64, 64], task=["qasper", "qasper"])) == 2


def test_keys_are_golden() -> None:
    """A change here makes every ledger in the world start anew: raise IDENTITY_VERSION with it."""
    assert [p.key for p in grids.points()] == GOLDEN


GOLDEN = ["8361991e6df194ec", "0ad6d7be56a55fd2", "5adb5217df83b6ea"]


@pytest.mark.parametrize(
    "change",
    [
        {"method": Spec("quest", {"label": "QUEST", "color": "red", "radius_scale": 1})},
        {"task": Spec("qasper", {"dataset": "qasper", "samples": 99, "label": "Q"})},
        {"data": Spec("files", {"root": "/elsewhere"}, {"digest": "qasper"})},
        {"model": Spec("small", {"path": "/b", "shape": {"layers": 3}}, {"weights": "small"})},
        {"protocol": Spec("renamed", {"tail": "question", "label": "other"})},
    ],
)
def test_key_ignores_labels_paths_and_sample_counts(change: dict[str, Spec]) -> None:
    point = quest()
    other = replace(point, **change)
    assert other.key == replace(point).key


@pytest.mark.parametrize(
    "change",
    [
        {"budget": 65},
        {"page_size": 32},
        {"dense_layers": 0},
        {"seed": 1},
        {"method": Spec("quest", {"radius_scale": 0.5})},
        {"method": Spec("quest2", {"radius_scale": 1.0})},
        {"data": Spec("generated", {"digest": "other"})},
        {"protocol": Spec("quest_paper", {"tail": "chars100"})},
        {"model": Spec("small", {"weights": "other"})},
    ],
)
def test_key_changes_with_whatever_changes_a_score(change: dict[str, object]) -> None:
    point = quest()
    assert replace(point, **change).key != point.key


def test_exclude_drops_what_matches_every_field() -> None:
    known, protocol = grids.specs(), grids.PROTOCOL
    data = {name: Spec("generated", {}) for name in known["task"]}
    grid = grids.grid(method=["full", "quest", "h2o"], budget=[64, 128])
    rules = [{"method": "h2o", "budget": [64]}, {"method": ["full"]}]
    found = plan.points(grid, rules, known, data, protocol)
    assert [(p.method.name, p.budget) for p in found] == [
        ("quest", 64),
        ("quest", 128),
        ("h2o", 128),
    ]
    with pytest.raises(ValueError, match="leave no point"):
        plan.points(grid, [{"model": "small"}], known, data, protocol)
    with pytest.raises(ValueError, match="no such field 'metod'; did you mean 'method'"):
        plan.points(grid, [{"metod": "h2o"}], known, data, protocol)
    with pytest.raises(ValueError, match="unknown method 'h20'; did you mean 'h2o'"):
        plan.points(grid, [{"method": "h20"}], known, data, protocol)


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"method": ["qest"]}, r"grid.method: unknown method 'qest'; did you mean 'quest'"),
        ({"task": []}, r"grid.task is empty.*hotpotqa, qasper"),
        ({"budget": [0]}, r"grid.budget: expected whole numbers of at least 1, got 0"),
        ({"budget": [64, "x"]}, r"grid.budget: expected whole numbers.* got 'x'"),
        ({"page_size": [-1]}, r"grid.page_size: .*at least 1, got -1"),
        ({"dense_layers": [-1]}, r"grid.dense_layers: .*at least 0, got -1"),
    ],
)
def test_wrong_grids_are_refused(lists: dict[str, list[object]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grids.points(**lists)


@given(done=st.sets(st.tuples(st.integers(0, 6), st.integers(0, 9))), size=st.integers(1, 5))
def test_units_hold_every_missing_pair_once_and_no_finished_one(
    done: set[tuple[int, int]], size: int
) -> None:
    found = grids.points(task=["qasper", "hotpotqa"], budget=[64, 128], method=["full", "quest"])
    number = {point.key: place for place, point in enumerate(found)}
    counts = {point.key: 8 if point.task.name == "qasper" else 5 for point in found}
    units = plan.units(
        found,
        counts,
        lambda key: {sample for place, sample in done if place == number[key]},
        lambda row: size,
    )
    pairs = [(number[p.key], s) for unit in units for p in unit.points for s in unit.samples]
    every = {(number[p.key], s) for p in found for s in range(counts[p.key])}
    assert len(pairs) == len(set(pairs))
    assert set(pairs) == every - done
    assert all(len({p.family for p in unit.points}) == 1 for unit in units)
    assert all(len(unit.samples) <= size for unit in units)


def test_units_are_shared_by_what_one_prefill_serves() -> None:
    found = grids.points(
        budget=[64, 128], method=["full", "quest", "h2o"], dense_layers=[0, 2], seed=[0, 1]
    )
    units = grids.units(found, samples=3, size=10)
    assert len(units) == 2  # one a seed; methods, budgets and dense layers share a prefill
    assert {len(unit.points) for unit in units} == {10}


def test_units_come_longest_first() -> None:
    found = grids.points(task=["qasper", "hotpotqa"])
    counts = {p.key: 2 if p.task.name == "qasper" else 4 for p in found}
    units = plan.units(found, counts, lambda key: set(), lambda row: 10)
    assert [unit.first.task.name for unit in units] == ["hotpotqa", "qasper"]


def test_unit_survives_its_trip_through_json() -> None:
    unit = grids.units(grids.points(), samples=3)[0]
    again = Unit.from_dict(plan.json.loads(plan.canonical(unit.to_dict())))
    assert again.key == unit.key
    assert [p.key for p in again.points] == [p.key for p in unit.points]


def test_build_imports_the_target_and_passes_settings_only() -> None:
    spec = Spec("lines", {"_target_": PASSKEY, "label": "x", "length": 300})
    assert spec.build(samples=4).length == 300


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"_target_": "os.system"}, r"_target_ must name a class of quest_dist.methods or"),
        ({}, r"_target_ must name"),
        ({"_target_": "quest_dist.tasks.nowhere.Thing"}, r"names no module"),
        ({"_target_": "quest_dist.tasks.passkey.PassKey"}, r"no 'PassKey'.*did you mean 'Passkey'"),
        ({"_target_": PASSKEY, "lengths": 300}, r"lines.lengths: no such setting; .*'length'"),
        ({"_target_": "quest_dist.tasks.files.Files"}, r"lines.root: .*required"),
    ],
)
def test_build_refuses_what_the_target_does_not_take(
    settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Spec("lines", settings).build()
