"""Figure 6: running perplexity by position, its difference from full, and its built-in check."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import synthetic_sweep as synthetic

from quest_dist import details, figures, table
from quest_dist.figures import fig06
from quest_dist.figures.caption import Caption
from quest_dist.spec import canonical
from quest_dist.table import Row

FEW = ("full", "quest", "h2o")


def rows(tmp_path: Path, n: int = 4) -> list[Row]:
    return synthetic.sweep(tmp_path, synthetic.points(["pg19"], FEW, (256,)), n)


def test_differences_by_position_are_paired_over_the_same_samples(tmp_path: Path) -> None:
    full, quest, _ = rows(tmp_path)
    assert full.versus_full == ()
    last = quest.versus_full[-1]
    assert last.x == 1024
    assert (last.value, last.low, last.high) == (quest.delta, quest.delta_low, quest.delta_high)
    assert [dot.x for dot in quest.versus_full] == [64, 256, 1024]


def test_pairs_are_by_sample_and_position() -> None:
    def record(sample: int, *curve: list[float]) -> dict[str, object]:
        return {"sample": sample, "metrics": {}, "details": {"curve": list(curve)}}

    ours = [record(0, [1, 2.0], [2, 3.0]), record(1, [1, 9.0])]
    text = details.summed(ours, "nll_increase", [record(0, [1, 0.5]), record(2, [2, 1.0])])
    (dot,) = details.dots(text, "versus_full")
    assert (dot.x, dot.value, dot.n) == (1, 1.5, 1)
    assert math.isnan(dot.low)
    assert "versus_full" not in details.read(details.summed(ours, "nll_increase"))


def test_the_csv_holds_values_and_differences_by_position(tmp_path: Path) -> None:
    made = rows(tmp_path)
    read_back = table.from_csv(table.to_csv(made))
    *_, data = figures.draw("fig06", read_back, tmp_path, Caption())
    lines = list(csv.DictReader(data.read_text().splitlines()))
    assert len(lines) == 9
    (last,) = (x for x in lines if x["method"] == "quest" and x["position"] == "1024")
    assert float(last["score"]) == pytest.approx(made[1].score)
    assert float(last["versus_full"]) == pytest.approx(made[1].delta)
    assert float(last["versus_full_low"]) == pytest.approx(made[1].delta_low)


def changed(row: Row, **curves: object) -> Row:
    return replace(row, details=canonical({**json.loads(row.details), **curves}))


def test_a_difference_below_the_budget_is_named_as_a_contradiction(tmp_path: Path) -> None:
    _, quest, h2o = rows(tmp_path)
    fine = changed(quest, versus_full=[[64, 0, 0, 0, 4], [256, 0, 0, 0, 4], [1024, 1, 1, 1, 4]])
    assert fig06.coincidence([fine]) == ""
    wrong = changed(quest, versus_full=[[256, 0.25, 0, 1, 4]])
    assert fig06.coincidence([fine, wrong]) == (
        "Contradiction: up to the budget there must be no difference, but Quest 256 by up to 0.25."
    )
    assert "H2O 256" in fig06.coincidence([h2o])


def test_the_papers_values_are_compared_at_their_positions_only(tmp_path: Path) -> None:
    (_, quest, _) = rows(tmp_path)
    curve = [[x, value, value - 0.1, value + 0.1, 10] for x, value in LONG]
    ours = replace(quest, model_label="LongChat-7B-v1.5-32K", data="hub", budget=4096)
    ours = changed(ours, curve=curve)
    verdict = figures.verdicts("fig06", [ours])["fig06"]
    assert verdict.verdict == "differs"
    assert verdict.reason == "of 2 values 1 differ, 0 within interval, 1 reproduced"
    *_, data = figures.draw("fig06", [ours], tmp_path, Caption())
    lines = list(csv.DictReader(data.read_text().splitlines()))
    hollow = [(x["position"], x["score"]) for x in lines if x["series"] == "paper"]
    assert hollow == [("30000", "6.846"), ("32000", "6.819")]
    assert "other model" in figures.verdicts("fig06", [quest])["fig06"].reason


LONG = ((8000, 7.0), (30000, 6.85), (32000, 7.5))
