"""Bounds that may be looked at after every sample hold at every look, whatever is drawn."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quest_dist import anytime

LOOKS = (5, 10, 20, 28, 40, 80)
Draw = Callable[[np.random.Generator, int], np.ndarray]


def rarely_all(random: np.random.Generator, n: int) -> np.ndarray:
    """Equal but for one in ten, which loses everything: few samples show nothing of it."""
    return np.where(random.random(n) < 0.1, -100.0, 0.0)


def a_little(random: np.random.Generator, n: int) -> np.ndarray:
    """Every sample loses about ten."""
    return np.clip(random.normal(-10, 5, n), -100, 100)


def noise(random: np.random.Generator, n: int) -> np.ndarray:
    """Losses and wins of everything, slightly more losses."""
    return np.where(random.random(n) < 0.55, -100.0, 100.0)


@pytest.mark.parametrize("draw", [rarely_all, a_little, noise])
def test_a_bound_is_wrong_at_any_look_as_rarely_as_promised(draw: Draw) -> None:
    wrong = 0
    for seed in range(200):
        samples = draw(np.random.default_rng(seed), max(LOOKS))
        found = [anytime.bounds(samples[:n], -100, 100, 0.05, 0.05) for n in LOOKS]
        wrong += any(low > -10 or high < -10 for low, high in found)
    assert wrong <= 20 + 13  # 200 seeds at 10 %, and three standard deviations


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-100, 100), max_size=30))
def test_bounds_hold_their_mean_stay_in_range_and_ignore_the_order(samples: list[float]) -> None:
    low, high = anytime.bounds(samples, -100, 100, 0.025, 0.025)
    assert -100 <= low <= high <= 100
    if samples:
        assert low - 1e-6 <= np.mean(samples) <= high + 1e-6
    again = anytime.bounds(samples[::-1], -100, 100, 0.025, 0.025)
    assert again == pytest.approx((low, high), abs=1e-6)


def test_bounds_narrow_with_samples_and_with_the_chance_allowed() -> None:
    random = np.random.default_rng(1)
    samples = list(random.normal(0, 20, 400).clip(-100, 100))
    widths = [np.ptp(anytime.bounds(samples[:n], -100, 100, 0.025, 0.025)) for n in (20, 100, 400)]
    assert widths[0] > 2 * widths[1] > 3 * widths[2]
    low, high = anytime.bounds(samples, -100, 100, 0.2, 0.001)
    mean = float(np.mean(samples))
    assert mean - low < high - mean


@pytest.mark.parametrize("loss", [0.02, 0.1, 0.15, 0.5])
def test_equal_pairs_needed_is_where_the_bound_passes(loss: float) -> None:
    n = anytime.equal_pairs_needed(loss, 0.025)
    passed = [anytime.bounds([0.0] * m, -1, 1, 0.025, 0.025)[0] > -loss for m in (n - 1, n)]
    assert passed == [False, True]


def test_nothing_is_known_of_nothing_and_samples_out_of_range_are_refused() -> None:
    assert anytime.bounds([], -100, 100, 0.025, 0.025) == (-100, 100)
    with pytest.raises(ValueError, match=r"outside -100\.\.100"):
        anytime.bounds([101.0], -100, 100, 0.025, 0.025)
