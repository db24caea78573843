"""The smallest lossless budget of a curve, looked for with as few evaluations as will do.

Successive halving over the ladder of budgets: its rungs are numbers of samples that double
(first_samples, twice that, ... all there are), and a budget leaves as soon as its interval decides
it, not by rank. Samples that are prefilled serve all budgets still open in one batch; a bisection
asks fewer budgets, but prefills the same samples again for each (a prefill costs as much as 25
budgets' decoding, measured with a 135M model at 4K tokens on a CPU). A budget is
    lossless    all of its interval of score minus full's lies above -delta
    lossy       all of it lies below -delta; smaller budgets are asked no more
    unresolved  neither, with all samples
and `smallest` is the last budget of the unbroken row of lossless ones that starts at the largest.

Invariants:
* Decisions are a function of the records that were asked for: whatever else is in the ledger, and
  wherever a search was cut, the same command comes to the same end.
* The chance that `smallest` of a curve is lossy is at most (1 - confidence) / 2, and so is the
  chance that any budget called lossy is not. Looking again costs nothing of it (see anytime), nor
  does the number of budgets on the lossless side: a false claim needs the largest lossy budget to
  pass, as all above it must (fixed-sequence testing). The lossy side shares its chance among the
  budgets. No shape of the curve is assumed.

Why no `ray.tune.search.Searcher`: it suggests one trial at a time on the word of single trials,
and a trial here is a unit, which holds the open budgets of all curves of a task because they share
a prefill; what it should hold next is known when all units of the rung are in. So a rung is a
Tuner over its units, on a Ray that is started once, and the search stands between two rungs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from quest_dist import anytime, stats

LOSSLESS, LOSSY, UNRESOLVED, OPEN, PASSED_BY = (
    "lossless",
    "lossy",
    "unresolved",
    "open",
    "passed by",  # undecided when a larger budget proved lossy
)
#: Metrics a search can decide: an interval that assumes nothing needs scores with bounds.
METRICS = stats.ACCURACIES & stats.POINTS


@dataclass  # Hydra fills it, so it cannot be frozen
class Search:
    """Settings. `delta`: points of the score that a lossless budget may lose, None: no search;
    `confidence` that no claim of a curve is wrong; `first_samples` of the first rung."""

    delta: float | None = None
    confidence: float = 0.95
    first_samples: int = 12

    def check(self) -> None:
        """Raise ValueError for settings that mean nothing."""
        if self.delta is None:
            return
        if not 0 < self.delta < 100:
            raise ValueError(
                f"search.delta={self.delta:g}: points of the score that a lossless budget may lose;"
                " must be above 0 and below 100 (null: no search, the whole grid)"
            )
        if not 0.5 <= self.confidence < 1:
            raise ValueError(
                f"search.confidence={self.confidence:g}: must be at least 0.5 and below 1"
            )
        if self.first_samples < 1:
            raise ValueError(f"search.first_samples={self.first_samples}: must be at least 1")

    @property
    def alpha(self) -> float:
        """The chance that a curve's lossless claim, or one of its lossy ones, is wrong."""
        return (1 - self.confidence) / 2

    @property
    def equal_pairs(self) -> int:
        """Samples on which a method must equal full, all of them, before it can be lossless."""
        loss = (self.delta or 0.0) / 100
        return max(anytime.equal_pairs_needed(loss, self.alpha), stats.FEWEST_FOR_CLAIM)

    def rungs(self, samples: int) -> list[int]:
        """How many samples each rung has, up to all of them."""
        found = [min(self.first_samples, samples)]
        while found[-1] < samples:
            found.append(min(2 * found[-1], samples))
        return found


@dataclass(frozen=True)
class Look:
    """What is known of a budget: score minus full's over the pairs among the first `asked`."""

    verdict: str = OPEN
    asked: int = 0
    pairs: int = 0
    value: float = 0.0
    low: float = -100.0
    high: float = 100.0


@dataclass(frozen=True)
class Followed:
    """How far a curve has come; `asked` is how many samples full must have for it."""

    looks: Mapping[int, Look]
    asked: int


def smallest(verdicts: Mapping[int, str]) -> int | None:
    """The last of the unbroken row of lossless budgets that starts at the largest."""
    found = None
    for budget in sorted(verdicts, reverse=True):
        if verdicts[budget] != LOSSLESS:
            break
        found = budget
    return found


def follow(
    search: Search,
    full: Mapping[int, float],
    scores: Mapping[int, Mapping[int, float]],
    samples: int,
    settled: Callable[[int | None, int], bool],
) -> Followed:
    """Decide what the records decide, up to the first rung that lacks some.

    `full` and `scores[budget]` hold scores by sample; `settled(budget, n)` says whether each of the
    first n samples of a budget (None: full) has its score or has failed for good.
    """
    looks = {budget: Look() for budget in sorted(scores)}
    asked = 0
    for n in search.rungs(samples):
        still = [budget for budget, look in looks.items() if look.verdict == OPEN]
        if not still:
            break
        asked = n
        if not all(settled(budget, n) for budget in (None, *still)):
            for budget in still:
                looks[budget] = replace(looks[budget], asked=n)
            break
        for budget in still:
            shared = [s for s in range(n) if s in full and s in scores[budget]]
            pairs = [scores[budget][s] - full[s] for s in shared]
            looks[budget] = _look(search, pairs, n, len(scores), n == samples)
        floor = max((b for b, look in looks.items() if look.verdict == LOSSY), default=0)
        for budget, look in looks.items():
            if budget < floor and look.verdict in (OPEN, UNRESOLVED):
                looks[budget] = replace(look, verdict=PASSED_BY)
    return Followed(looks, asked)


def _look(search: Search, pairs: Sequence[float], asked: int, budgets: int, last: bool) -> Look:
    assert search.delta is not None
    low, high = anytime.bounds(pairs, -100, 100, search.alpha, search.alpha / budgets)
    verdict = UNRESOLVED if last else OPEN
    if high < -search.delta:
        verdict = LOSSY
    elif low > -search.delta and len(pairs) >= stats.FEWEST_FOR_CLAIM:
        verdict = LOSSLESS
    mean = sum(pairs) / len(pairs) if pairs else 0.0
    return Look(verdict, asked, len(pairs), mean, low, high)
