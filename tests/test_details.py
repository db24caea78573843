"""Details: what samples measured beside their scores, summed up, and back from its text."""

from __future__ import annotations

import math
from typing import Any

import pytest

from quest_dist import details


def record(sample: int, **parts: Any) -> dict[str, Any]:
    metrics = parts.pop("metrics", {})
    return {"sample": sample, "metrics": metrics, "details": parts}


def test_a_curve_is_summed_by_x_with_intervals() -> None:
    records = [record(i, curve=[[1, 10.0 * i], [2, 5.0]]) for i in range(4)]
    records.append(record(4, curve=[[3, 7.0]]))
    dots = details.dots(details.summed(records, "accuracy"))
    assert [(dot.x, dot.value, dot.n) for dot in dots] == [(1, 15.0, 4), (2, 5.0, 4), (3, 7.0, 1)]
    assert dots[0].low < 15.0 < dots[0].high
    assert math.isnan(dots[2].low)
    assert math.isnan(dots[2].high)


def test_a_perplexity_curve_is_exp_of_the_mean() -> None:
    records = [record(i, curve=[[8, nll]]) for i, nll in enumerate((1.0, 3.0))]
    (dot,) = details.dots(details.summed(records, "perplexity"))
    assert dot.value == pytest.approx(math.exp(2.0))


def test_facts_are_means_and_notes_are_distinct() -> None:
    records = [
        record(0, metrics={"score_us": 2.0}, notes={"device": "a"}),
        record(1, metrics={"score_us": 4.0, "other": math.inf}, notes={"device": "a"}),
        record(2, notes={"device": "b"}),
    ]
    text = details.summed(records, "attention_us")
    assert details.fact(text, "score_us") == 3.0
    assert math.isnan(details.fact(text, "other"))
    assert details.notes(text, "device") == ("a", "b")
    assert details.notes(text, "clock") == ()


def test_the_first_drawing_is_kept_and_nothing_else_leaves_a_trace() -> None:
    records = [record(0), record(1, drawing={"map": [[1.0]]}), record(2, drawing={"map": [[2.0]]})]
    assert details.read(details.summed(records, "f1")) == {"drawing": {"map": [[1]]}}
    assert details.summed([{"sample": 0}], "f1") == "{}"
    assert details.dots("") == ()
