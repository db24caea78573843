"""Ordering: each neighbouring pair of tiers, judged at equal budget by its interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import synthetic_sweep as synthetic

from quest_dist import ordering
from quest_dist.table import Row

METHODS = ("full", "oracle_page", "tightbound", "quest", "h2o", "streaming")


@pytest.fixture
def rows(tmp_path: Path) -> list[Row]:
    """A table in which every score follows the order, 5 points a tier, at two budgets."""
    made = synthetic.points(["recall"], METHODS, (64, 256))
    table = synthetic.sweep(tmp_path, made, 3)
    known = {name: 90.0 - 5 * place for place, name in enumerate(METHODS)}
    return [set_to(row, known[row.method], 1.0) for row in table]


def set_to(row: Row, score: float, half: float) -> Row:
    return replace(row, score=score, low=score - half, high=score + half)


def change(rows: Sequence[Row], method: str, budget: int, score: float, half: float) -> list[Row]:
    return [
        set_to(row, score, half) if (row.method, row.budget) == (method, budget) else row
        for row in rows
    ]


class Samples:
    """Records of some points by their keys."""

    def __init__(self, scores: dict[str, list[float]]) -> None:
        self.scores = scores

    def records(self, point: str) -> list[dict[str, Any]]:
        found = self.scores.get(point, [])
        return [{"sample": i, "score": s, "error": None} for i, s in enumerate(found)]


def test_an_order_that_holds_is_one_sentence(rows: list[Row]) -> None:
    assert ordering.statements(rows) == [
        "recall on SmolLM2-135M: Oracle (pages) \u2265 TightBound (ours) \u2265 Quest \u2265 H2O"
        " \u2265 StreamingLLM holds in all 8 comparisons at equal budget"
    ]
    assert {step.verdict for step in ordering.steps(rows)} == {ordering.HOLDS}


def test_what_is_reversed_is_named_with_its_interval_and_the_page_oracle(rows: list[Row]) -> None:
    [said] = ordering.statements(change(rows, "h2o", 64, 86.0, 1.0))
    assert "holds in 7 of 8" in said
    # 75 - 86 with halves of 1 each: 1.4 together.
    assert "fails in 1 (Quest - H2O at 64: -11.0 [-12.4, -9.6], Oracle (pages) 85.0)" in said


def test_a_reversal_that_intervals_cannot_resolve_is_told_apart(rows: list[Row]) -> None:
    [said] = ordering.statements(change(rows, "h2o", 256, 76.0, 3.0))
    assert "reversed within intervals in 1 (Quest - H2O at 256: -1.0 [-4.2, +2.2]" in said
    assert "fails" not in said


def test_records_pair_samples(rows: list[Row]) -> None:
    wide = change(change(rows, "h2o", 64, 76.0, 20.0), "quest", 64, 75.0, 20.0)
    keys = {(row.method, row.budget): row.point for row in wide}
    base = [40.0, 55.0, 60.0, 75.0, 80.0, 90.0, 95.0, 99.0]
    paired = Samples({keys["quest", 64]: base, keys["h2o", 64]: [s + 1 for s in base]})
    by_interval = {str(s.worse.method): s.verdict for s in ordering.steps(wide)[:4]}
    assert by_interval["h2o"] == ordering.WITHIN
    [step] = [
        s for s in ordering.steps(wide, paired) if (s.worse.method, s.worse.budget) == ("h2o", 64)
    ]
    assert step.verdict == ordering.FAILS
    assert step.lead.value == pytest.approx(-1.0)


def test_tiers_that_were_not_run_are_stepped_over_and_accuracy_works_alike(tmp_path: Path) -> None:
    made = synthetic.points(["passkey"], ("full", "quest", "streaming"), (512,))
    [step] = ordering.steps(synthetic.sweep(tmp_path, made, 8))
    assert (step.better.method, step.worse.method) == ("quest", "streaming")
    assert step.verdict == ordering.HOLDS


def test_lower_is_better_where_it_is(tmp_path: Path) -> None:
    made = synthetic.points(["pg19"], ("quest", "streaming"), (512,))
    rows = synthetic.sweep(tmp_path, made, 4)
    scores = {"quest": 7.0, "streaming": 9.0}
    [step] = ordering.steps([set_to(row, scores[row.method], 0.5) for row in rows])
    assert step.verdict == ordering.HOLDS
    assert (step.lead.value, step.lead.low < 2.0 < step.lead.high) == (2.0, True)


def test_points_without_results_are_not_judged(rows: list[Row]) -> None:
    assert ordering.statements([replace(row, n=0) for row in rows]) == []
