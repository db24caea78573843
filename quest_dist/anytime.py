"""An interval of a mean that may be looked at after every sample, and still be believed.

Ordinary 95 % intervals miss in more than 5 % of the searches that look until one pleases, and
those that lean on the spread seen miss far more often where a rare sample loses everything: twenty
equal pairs say nothing against one loss in ten (0.9^20 = 12 %). These intervals are tests by
betting (Waudby-Smith and Ramdas 2024): against the claim that the mean is `m`, a bettor who can
never go into debt stakes a fraction of what she has on each sample exceeding `m`. Were the claim
true her wealth would be a martingale, and would ever reach 1 / alpha with probability alpha at
most (Ville 1939); so every `m` against which it did is outside.

Invariants: nothing is assumed but independent samples between known bounds, no distribution and no
number of samples; the chance that a bound is wrong at any look at all is at most its alpha; an
interval holds its estimate. A sample's place in the order does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

#: Fractions staked, and how the first wealth is shared among them: no one fraction suits both
#: pairs that never differ (all of it) and pairs that often do.
STAKES = np.array([1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16])
SHARES = np.array([1 / 2, 1 / 8, 1 / 8, 1 / 8, 1 / 8])
STEPS = 24  # halvings of a bound's place: below a millionth of the range


def bounds(
    samples: Sequence[float], least: float, most: float, below: float, above: float
) -> tuple[float, float]:
    """Return the interval of the mean of samples that lie in `least`..`most`.

    `below` and `above` are the chances, at most, that the mean is ever below the lower bound or
    above the upper one. Raises ValueError for a sample outside the range.
    """
    values = (np.asarray(samples, dtype=np.float64) - least) / (most - least)
    if np.any((values < 0) | (values > 1)):
        raise ValueError(f"anytime: a sample lies outside {least:g}..{most:g}")
    low, high = _lower(values, below), 1 - _lower(1 - values, above)
    return least + (most - least) * low, least + (most - least) * high


def equal_pairs_needed(loss: float, below: float) -> int:
    """Pairs that must agree, all of them, before a mean loss of `loss` is ruled out.

    `loss` is a share of the most that a sample can lose, and a sample can win as much.
    """
    grown = np.log1p(STAKES * loss / (1 - loss))  # by one equal pair
    few, enough = 0, math.ceil(math.log(1 / (below * SHARES[0])) / float(grown[0]))
    while enough - few > 1:
        middle = (few + enough) // 2
        wealth = np.logaddexp.reduce(np.log(SHARES) + middle * grown)
        few, enough = (few, middle) if wealth >= -math.log(below) else (middle, enough)
    return enough


def _lower(values: NDArray[np.float64], alpha: float) -> float:
    """The largest mean, in 0..1, against which the wealth has reached 1 / alpha; 0 if none."""
    if not values.any():
        return 0.0
    low, high = 0.0, float(values.mean())  # wealth against the mean itself is at most 1
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if _wealth(values, middle) >= -math.log(alpha) else (low, middle)
    return low


def _wealth(values: NDArray[np.float64], mean: float) -> float:
    """Logarithm of the wealth of who bet against `mean`, which falls as `mean` rises."""
    with np.errstate(divide="ignore"):  # all staked and lost: log 0
        grown = np.log(1 - STAKES[:, None] + STAKES[:, None] * values / mean).sum(axis=1)
        return float(np.logaddexp.reduce(np.log(SHARES) + grown))
