"""Intervals hold what they promise: cover, never fake certainty, and pair with full."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quest_dist import stats

SCORES = st.lists(st.floats(0, 100), min_size=2, max_size=12)


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (5, 2.57058), (9, 2.26216), (199, 1.97196)],
)
def test_student_is_the_table_of_every_textbook(freedom: int, quantile: float) -> None:
    assert stats._student(freedom) == pytest.approx(quantile, abs=2e-5)


def test_wilson_is_the_published_value() -> None:
    # Newcombe (1998), table I: 81 of 263, 0.2553 to 0.3662.
    assert stats.wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)


@settings(deadline=None, max_examples=60)
@given(SCORES)
def test_an_interval_holds_its_estimate_and_stays_in_range(scores: list[float]) -> None:
    got = stats.summary(scores, "f1")
    assert 0 <= got.low <= got.value <= got.high <= 100
    assert got == stats.summary(scores, "f1")


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=2, max_size=12))
def test_a_paired_difference_is_antisymmetric_in_value(pairs: list[tuple[float, float]]) -> None:
    ours, full = [a for a, _ in pairs], [b for _, b in pairs]
    there, back = stats.paired(ours, full, "f1"), stats.paired(full, ours, "f1")
    assert there.value == pytest.approx(-back.value)
    assert -100 <= there.low <= there.value <= there.high <= 100


@pytest.mark.parametrize("metric", ["f1", "accuracy", "string_match_all", "perplexity", "score"])
def test_one_sample_has_no_interval(metric: str) -> None:
    for got in (stats.summary([1.0], metric), stats.paired([1.0], [1.0], metric)):
        assert got.n == 1
        assert math.isnan(got.low)
        assert math.isnan(got.high)


def test_no_sample_is_nothing() -> None:
    assert stats.summary([], "f1").n == 0
    assert math.isnan(stats.paired([], [], "f1").value)


@pytest.mark.parametrize("score", [0.0, 100.0, 37.5])
def test_samples_that_agree_do_not_give_certainty(score: float) -> None:
    few, many = stats.summary([score] * 10, "f1"), stats.summary([score] * 200, "f1")
    assert few.high - few.low > 20 > many.high - many.low > 1


def test_ten_of_ten_reads_72_to_100() -> None:
    got = stats.summary([100.0] * 10, "accuracy")
    assert (got.low, got.high) == (pytest.approx(72.25, abs=0.01), 100.0)


def test_equal_answers_need_two_hundred_pairs_to_resolve_two_points() -> None:
    widths = {n: -stats.paired([50.0] * n, [50.0] * n, "f1").low for n in (10, 18, 180, 200)}
    assert widths[10] > 25
    assert widths[18] > 10  # a method that loses one pair in ten shows none of 18 in 15 of 100
    assert widths[180] > 2 > widths[200]


def test_perplexity_goes_through_exp() -> None:
    nll = np.log([6.0, 6.5, 7.0, 6.2, 6.8, 6.4, 6.6, 6.9, 7.1])
    got = stats.summary(list(nll), "perplexity")
    assert got.value == pytest.approx(math.exp(nll.mean()))
    assert 6.0 < got.low < got.value < got.high < 7.1
    worse = stats.paired(list(nll + 0.01), list(nll), "perplexity")
    assert worse.value == pytest.approx(got.value * math.expm1(0.01))


@pytest.mark.parametrize("n", [5, 20])
def test_intervals_cover_as_often_as_they_say(n: int) -> None:
    random = np.random.default_rng(7)
    trials = [stats.summary(list(random.normal(50, 10, n)), "f1") for _ in range(300)]
    assert 0.90 <= np.mean([t.low <= 50 <= t.high for t in trials]) <= 0.99


def test_pairing_tells_apart_what_separate_intervals_cannot() -> None:
    full = list(np.random.default_rng(3).uniform(0, 90, 100))
    ours = [score + 3 + (i % 5 - 2) for i, score in enumerate(full)]
    delta = stats.paired(ours, full, "f1")
    assert delta.low > 2
    assert stats.summary(ours, "f1").low < stats.summary(full, "f1").high


@dataclass
class Dot:
    """As much of a table row as a recommendation reads."""

    budget: int
    delta: float
    delta_low: float
    delta_high: float
    metric: str = "f1"
    score: float = 50.0
    pairs: int = 200
    n: int = 200
    task: str = "qasper"
    label: str = "Quest"
    model: str = "m"
    curve: tuple[str, ...] = ("m",)


def dots(*deltas: tuple[int, float, float]) -> list[Dot]:
    """Rows from (budget, delta, half width)."""
    return [Dot(b, d, d - half, d + half) for b, d, half in deltas]


@pytest.mark.parametrize(
    ("curve", "budget"),
    [
        (dots((256, -5, 1), (512, -0.5, 1), (1024, 0.1, 1)), 512),
        (dots((256, -5, 1), (512, -0.5, 2), (1024, 0.1, 1)), 1024),
        (dots((256, 0.0, 1), (512, -3, 1), (1024, 0.1, 1)), 1024),  # 512 contradicts 256
        (dots((256, 0.0, 1), (512, -1.0, 9), (1024, 0.1, 1)), 256),  # unsure is no contradiction
        (dots((256, -5, 1), (512, -4, 1)), None),
        (dots((256, 0.0, math.nan)), None),
    ],
)
def test_smallest_lossless_budget(curve: list[Dot], budget: int | None) -> None:
    assert stats.smallest_lossless_budget(curve, 2.0) == budget
    assert stats.smallest_lossless_budget(curve[::-1], 2.0) == budget


def test_a_handful_of_samples_is_never_called_lossless() -> None:
    assert stats.smallest_lossless_budget([Dot(512, 0.0, -0.1, 0.1, pairs=4)], 2.0) is None
    assert stats.smallest_lossless_budget([Dot(512, 0.0, -0.1, 0.1, pairs=5)], 2.0) == 512


def test_lossless_perplexity_is_counted_in_percent_and_upwards() -> None:
    good = Dot(1024, 0.05, 0.02, 0.09, metric="perplexity", score=6.85)
    bad = Dot(512, 0.3, 0.2, 0.4, metric="perplexity", score=7.1)
    assert stats.smallest_lossless_budget([bad, good], 2.0) == 1024


@pytest.mark.parametrize(
    ("curve", "says"),
    [
        (dots((512, -0.5, 1)), "qasper: Quest lossless from 512 (delta 2, n=200)"),
        (dots((512, -9, 1)), "loses more than 2 at every budget measured (n=200)"),
        (dots((512, 0.5, 9)), "not resolved with n=200 (delta 2; nearest to full: +0.5"),
        (dots((512, 0.5, math.nan)), "not resolved with n=200"),
    ],
)
def test_recommendation_says_what_is_known(curve: list[Dot], says: str) -> None:
    (line,) = stats.recommendation(curve, 2.0)
    assert says in line


def test_recommendation_without_full() -> None:
    (line,) = stats.recommendation([Dot(512, math.nan, math.nan, math.nan, pairs=0)])
    assert "full has no result" in line
