"""Units on many workers: the simulation by hand where that can be done, and the order it led to."""

from __future__ import annotations

import json
import random
from pathlib import Path

import grids
import pytest

from quest_dist import cost, plan
from quest_dist.bench.__main__ import main
from quest_dist.bench.simulate import Driver, Job, shortest, simulate
from quest_dist.plan import Unit
from quest_dist.work import in_turn


def jobs(*models: str, samples: tuple[float, ...] = (1.0, 2.0)) -> list[Job]:
    """A job a letter; to load a model takes 10 s."""
    return [Job(model, 10.0, samples) for model in models]


def test_one_worker_loads_a_model_once_and_does_one_thing_after_the_other() -> None:
    found = simulate(jobs(*"abab"), 1)
    assert (found.makespan, found.loads, found.evaluated) == (2 * 10 + 4 * 3, 2, 4 * 3)
    assert simulate(jobs(*"abab"), 1, Driver(0.5, 0.25)).makespan == 32 + 4 * 0.5 + 8 * 0.25


def test_workers_share_the_units_and_wait_for_one_driver() -> None:
    assert simulate(jobs(*"aaaa"), 2).makespan == 10 + 2 * 3
    # The second worker begins when the driver has begun the first; their reports never meet.
    assert simulate(jobs(*"aa"), 2, Driver(unit=5.0)).makespan == 5 + 5 + 10 + 3
    # Four reports of a sample of a second each, and the driver takes 2 s for one of them.
    busy = simulate(jobs(*"aaaa", samples=(1.0,)), 4, Driver(report=2.0))
    assert (busy.makespan, busy.driver) == (10 + 1 + 4 * 2, 8)


def test_what_a_broken_worker_lost_is_run_again_in_a_later_round() -> None:
    many = jobs(*"ab" * 20, samples=(100.0,) * 5)
    found = simulate(many, 4, breaks_per_hour=3.0, rounds=50, seed=1)
    assert found.broken > 0
    assert 1 < found.rounds < 50
    assert found.evaluated == 40 * 5 * 100
    assert 0 < found.lost < 100 * found.broken
    assert found == simulate(many, 4, breaks_per_hour=3.0, rounds=50, seed=1)
    assert found != simulate(many, 4, breaks_per_hour=3.0, rounds=50, seed=2)
    given_up = simulate(many, 4, breaks_per_hour=3.0, rounds=1, seed=1)
    assert given_up.evaluated == (40 * 5 - given_up.given_up) * 100


def test_nothing_is_faster_than_the_bound() -> None:
    chance = random.Random(0)
    for _ in range(200):
        many = [
            Job(chance.choice("abc"), 10.0, tuple(chance.uniform(0.1, 9) for _ in range(4)))
            for _ in range(chance.randint(1, 30))
        ]
        workers = chance.randint(1, 9)
        assert simulate(many, workers).makespan >= shortest(many, workers) - 1e-9


def units(**samples: int) -> list[Unit]:
    """Units of one sample, longest first; so many of each model."""
    found = grids.points(model=list(samples), method=["full"])
    counts = {point.key: samples[point.model.name] for point in found}
    return plan.units(found, counts, lambda key: set(), lambda row: 1)


def test_models_begin_in_proportion_to_their_work_and_one_worker_takes_one_after_the_other() -> (
    None
):
    found = units(small=2, large=4)
    assert len(found) == 6
    turns = [unit.first.model.name for unit in in_turn(found, lambda unit: 1.0, 3)]
    assert turns == ["small", "large", "large", "small", "large", "large"]
    assert {unit.key for unit in in_turn(found, lambda unit: 1.0, 3)} == {u.key for u in found}
    mixed = [found[i] for i in (0, 2, 1, 3, 4, 5)]
    alone = [unit.first.model.name for unit in in_turn(mixed, lambda unit: 1.0, 1)]
    assert alone == ["small"] * 2 + ["large"] * 4


def test_the_command_simulates_the_papers_sweep_and_says_what_it_rests_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "scale.json"
    command = ["scale", "--sweep", "longbench_budgets", "--gpus", "8", "--json", str(path)]
    assert main(command) == 0
    content = json.loads(path.read_text())
    rows = {(row["units cut"], row["order"], row["breaks/h"]): row for row in content["rows"]}
    planned = rows["as planned", "as planned", 0.0]
    assert 1 <= planned["x bound"] < 1.3
    assert content["summary"] == {"longbench_budgets x_bound 8": planned["x bound"]}
    assert planned["loads"] < rows["as planned", "as given", 0.0]["loads"]
    assert rows["as planned", "as planned", 1.0]["makespan s"] >= planned["makespan s"]
    assert "not measured on a GPU" in content["setting"]["seconds"]
    assert main(command) == 0
    assert json.loads(path.read_text()) == content
    monkeypatch.setattr(cost, "GPU_FLOPS", cost.GPU_FLOPS / 10)
    assert main(command) == 0
    assert json.loads(path.read_text())["rows"][0]["bound s"] > planned["bound s"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--gpus", "0"], "--gpus=[0]: must be above 0"),
        (["--report-ms", "-1"], "--report-ms=-1: must be at least 0"),
        (["--sweep", "smoke:x"], "--sweep=smoke:x: a whole number of seeds"),
        (["--sweep", "kernels"], "--sweep=kernels: it has only times, which run alone"),
        (["--ledger", "/nowhere.db"], "--ledger=/nowhere.db: no such file"),
    ],
)
def test_wrong_options_are_one_line(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["scale", *options]) == 2
    assert capsys.readouterr().err.strip() == f"error: {said}"
