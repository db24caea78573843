"""Intervals: how far an average over few samples can be trusted, and what follows from it.

Invariants: every interval is 95 %, two-sided, deterministic, and contains its estimate. One sample
has no interval (NaN), never a zero-width one. Comparisons with full are paired: the same samples.

Which interval (each sample is one draw; scores are 0..100, perplexity samples are mean NLLs):
    one sample                           none
    only zeros and hundreds              Wilson (1927); so 10 of 10 reads 72..100, not 100..100
    all scores alike, but neither        Wilson at that share: no 0..100 score varies more
    fewer than 8 samples                 Student's t, cut to the range of the score
    8 or more                            bootstrap, percentiles widened for small n (Hesterberg
                                         2015, "expanded percentile")
    a paired difference where fewer      Wilson for the share of pairs that lose and of those that
    than 5 samples differ                win, each of which may lose or win everything; a bootstrap
                                         would report certainty it cannot have
    times, and differences of times      order statistics of the median: no assumption on how times
                                         are distributed; fewer than 6 have none
Perplexity is exp of the mean NLL, and its interval goes through exp. A time is the median of its
samples, each a repeat.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from quest_dist.table import Row

LEVEL = 0.95
RESAMPLES = 5000
SEED = 0
FEWEST_FOR_BOOTSTRAP = 8
FEWEST_DIFFERENT = 5
# Metrics whose samples lie in 0..100.
POINTS = frozenset({"f1", "rouge_l", "accuracy", "recall", "attention", "string_match_all"})
TIMES = frozenset({"attention_us", "step_ms"})
RATES = frozenset({"tokens_per_pass"})  # higher is better, without a largest value
FEWEST_FOR_CLAIM = 5  # pairs below which nothing is called lossless, whatever their spread
DELTA = 2.0  # what is called lossless: points of a score, percent of a perplexity
LOWER_IS_BETTER = frozenset({"perplexity", "nll_increase", *TIMES})
#: Metrics in which a method can be called lossless: faster or slower is another question.
ACCURACIES = frozenset({*POINTS, "perplexity"}) - {"recall", "attention"}

_Z = NormalDist().inv_cdf(0.5 + LEVEL / 2)


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval; NaN bounds where `n` samples cannot give one."""

    value: float
    low: float
    high: float
    n: int


NOTHING = Estimate(math.nan, math.nan, math.nan, 0)


def summary(samples: Sequence[float], metric: str) -> Estimate:
    """Aggregate of one point: the mean of its samples, exp of it for perplexity, for times their
    median."""
    values = np.asarray(samples, dtype=np.float64)
    n = len(values)
    if n == 0:
        return NOTHING
    if metric in TIMES:
        return median(samples)
    mean = float(values.mean())
    if metric not in POINTS:
        low, high = _interval(values)
        if metric == "perplexity":
            return Estimate(math.exp(mean), math.exp(low), math.exp(high), n)
        return Estimate(mean, low, high, n)
    if n > 1 and (np.all(values == values[0]) or np.all((values == 0) | (values == 100))):
        low, high = wilson(mean / 100, n)
        return _holding(mean, 100 * low, 100 * high, n)
    low, high = _interval(values)
    return _holding(mean, max(low, 0.0), min(high, 100.0), n)


def paired(samples: Sequence[float], full: Sequence[float], metric: str) -> Estimate:
    """Score minus full's score over the same samples, in the metric's own unit.

    For perplexity the interval is that of the mean NLL difference, carried through exp at full's
    measured perplexity.
    """
    if len(samples) != len(full):
        raise ValueError(f"paired: {len(samples)} samples against {len(full)} of full")
    if not len(samples):
        return NOTHING
    differences = np.asarray(samples, dtype=np.float64) - np.asarray(full, dtype=np.float64)
    n, mean = len(differences), float(differences.mean())
    if metric == "perplexity":
        low, high = _interval(differences)
        base = math.exp(float(np.mean(full)))
        value, low, high = (base * math.expm1(x) for x in (mean, low, high))
        return Estimate(value, low, high, n)
    if metric in TIMES:
        return median([float(value) for value in differences])
    if metric not in POINTS:
        return Estimate(mean, *_interval(differences), n)
    if n > 1 and np.count_nonzero(differences) < FEWEST_DIFFERENT:
        low, high = _few_differ(differences)
    else:
        low, high = _interval(differences)
    return _holding(mean, max(low, -100.0), min(high, 100.0), n)


def median(values: Sequence[float]) -> Estimate:
    """The median with the narrowest interval of two order statistics, equally far from the ends,
    that holds it with at least 95 %; NaN bounds where even the smallest and largest do not."""
    ordered, n = sorted(values), len(values)
    if not n:
        return NOTHING
    middle = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    outside, cut = 0.0, 0  # the chance that the median lies outside, at `cut` values from the ends
    for k in range(n // 2):
        outside += 2 * math.comb(n, k) * 0.5**n
        if outside > 1 - LEVEL:
            break
        cut = k + 1
    if not cut:
        return Estimate(middle, math.nan, math.nan, n)
    return Estimate(middle, ordered[cut - 1], ordered[n - cut], n)


def wilson(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a proportion seen as `share` (0..1) of `n` trials."""
    spread = _Z * _Z / n
    centre = (share + spread / 2) / (1 + spread)
    half = _Z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def loss(row: Row) -> tuple[float, float, float]:
    """How much worse than full a row is: (best case of its interval, estimate, worst case).

    Positive is worse. In points of the score; for perplexity in percent of full's perplexity.
    """
    if row.metric in LOWER_IS_BETTER:
        full = row.score - row.delta
        return 100 * row.delta_low / full, 100 * row.delta / full, 100 * row.delta_high / full
    return -row.delta_high, -row.delta, -row.delta_low


def smallest_lossless_budget(rows: Iterable[Row], delta: float) -> int | None:
    """Smallest budget of one curve that loses less than `delta` against full, surely.

    Surely: the whole paired interval of at least FEWEST_FOR_CLAIM samples lies on the good side of
    -delta, and the estimate of no larger budget lies on the bad side of it. None where no budget is
    resolved. `delta` is in points (for perplexity in percent).
    """
    curve = sorted((row for row in rows if row.budget is not None), key=lambda row: row.budget or 0)
    found: int | None = None
    for row in reversed(curve):
        _, estimate, worst = loss(row)
        if estimate >= delta:
            break
        if worst < delta and row.pairs >= FEWEST_FOR_CLAIM:
            found = row.budget
    return found


@dataclass(frozen=True)
class Advice:
    """What is known of one curve: `budget` from which on it is lossless, or None with `known`:
    whether it surely loses at every budget measured. `text` says it in a line; `first` is a row."""

    first: Row
    budget: int | None
    known: bool
    text: str


def advice(rows: Iterable[Row], delta: float = DELTA) -> list[Advice]:
    """From which budget on each curve is lossless, or why that cannot be said, in their order."""
    curves: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        if row.budget is not None and row.n and row.metric in ACCURACIES | {"points"}:
            curves.setdefault(row.curve, []).append(row)
    several_models = len({key[0] for key in curves}) > 1
    found = []
    for curve in curves.values():
        first = curve[0]
        name = f"{first.task}: {first.label}" + (f" on {first.model}" if several_models else "")
        unit = " %" if first.metric in LOWER_IS_BETTER else ""
        budget = smallest_lossless_budget(curve, delta)
        known = budget is not None or _loses(curve, delta)
        said = _verdict(curve, delta, unit, budget)
        found.append(Advice(first, budget, known, f"{name} {said}"))
    return found


def recommendation(rows: Iterable[Row], delta: float = DELTA) -> list[str]:
    """The lines of `advice`."""
    return [found.text for found in advice(rows, delta)]


def _verdict(curve: Sequence[Row], delta: float, unit: str, budget: int | None) -> str:
    counted = sorted({row.pairs for row in curve})
    n = f"n={counted[0]}" if len(counted) == 1 else f"n={counted[0]}..{counted[-1]}"
    if not counted[-1]:
        return "cannot be compared: full has no result on the same samples"
    if budget is not None:
        return f"lossless from {budget} (delta {delta:g}{unit}, {n})"
    best = min((row for row in curve if row.pairs), key=lambda row: (loss(row)[1], row.budget))
    if math.isnan(best.delta_low):
        return f"not resolved with {n}"
    if _loses(curve, delta):
        return f"loses more than {delta:g}{unit} at every budget measured ({n})"
    seen = f"{best.delta:+.1f} [{best.delta_low:+.1f}, {best.delta_high:+.1f}] at {best.budget}"
    return f"not resolved with {n} (delta {delta:g}{unit}; nearest to full: {seen})"


def _loses(curve: Sequence[Row], delta: float) -> bool:
    """Whether even the best case of every compared row loses `delta` or more."""
    compared = [row for row in curve if row.pairs]
    return bool(compared) and all(loss(row)[0] >= delta for row in compared)


def _interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """Interval of a mean without a known range: none, Student's t or bootstrap, by n."""
    n = len(values)
    if n < 2:
        return math.nan, math.nan
    mean = float(values.mean())
    if np.all(values == values[0]):
        return mean, mean
    if n < FEWEST_FOR_BOOTSTRAP:
        half = _student(n - 1) * float(values.std(ddof=1)) / math.sqrt(n)
        return mean - half, mean + half
    tail = NormalDist().cdf(-math.sqrt(n / (n - 1)) * _student(n - 1))
    means = _draws(n) @ (values - mean) / n
    low, high = np.quantile(means, [tail, 1 - tail])
    return mean + min(float(low), 0.0), mean + max(float(high), 0.0)


def _few_differ(differences: NDArray[np.float64]) -> tuple[float, float]:
    n = len(differences)
    lost, won = (float(np.mean(side)) for side in (differences < 0, differences > 0))
    return -100 * wilson(lost, n)[1], 100 * wilson(won, n)[1]


def _holding(value: float, low: float, high: float, n: int) -> Estimate:
    """Rounding and shrunken centres must not push a value out of its own interval."""
    return Estimate(value, min(low, value), max(high, value), n)


@lru_cache(maxsize=4)
def _draws(n: int) -> NDArray[np.float64]:
    """How often each of n samples is drawn, [RESAMPLES, n]. Shared, so intervals are comparable."""
    chosen = np.random.default_rng([SEED, n]).integers(n, size=(RESAMPLES, n))
    counts = np.zeros((RESAMPLES, n))
    np.add.at(counts, (np.arange(RESAMPLES)[:, None], chosen), 1.0)
    return counts


@lru_cache(maxsize=64)
def _student(freedom: int) -> float:
    """The t beyond which 2.5 % of Student's distribution lie on either side, by bisection."""
    low, high = 0.0, 1000.0
    while high - low > 1e-10 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < LEVEL else (low, middle)
    return (low + high) / 2


def _within(t: float, freedom: int) -> float:
    """P(|T| <= t), Abramowitz & Stegun 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine = math.cos(angle)
    odd = freedom % 2
    term = total = cosine if odd else 1.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= (k - 1) / k * cosine**2
        total += term
    if freedom == 1:
        return 2 * angle / math.pi
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total
