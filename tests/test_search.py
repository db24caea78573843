"""The search finds what is there, claims nothing from noise, and asks for less than the grid."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from quest_dist.search import LOSSLESS, LOSSY, OPEN, PASSED_BY, UNRESOLVED, Followed, Search, follow

SEARCH = Search(delta=15.0, first_samples=8)
CLEAR = {64: 0.9, 128: 0.7, 256: 0.5, 512: 0.0, 1024: 0.0}


def drawn(losses: Mapping[int, float], samples: int, seed: int) -> dict[int, dict[int, float]]:
    """Scores by budget and sample where full has 100; what is lost shrinks as budgets grow."""
    luck = np.random.default_rng(seed).random(samples)
    return {b: {s: 100.0 * (luck[s] >= p) for s in range(samples)} for b, p in losses.items()}


def searched(
    scores: Mapping[int, Mapping[int, float]], samples: int, search: Search = SEARCH
) -> tuple[Followed, int]:
    """Follow a search to its end, giving it only what it asks for; with how often it asked."""
    full = dict.fromkeys(range(samples), 100.0)
    known: dict[int, int] = dict.fromkeys(scores, 0)
    for rounds in range(100):
        given = {b: {s: own[s] for s in range(known[b])} for b, own in scores.items()}

        def settled(budget: int | None, n: int, given: dict[int, dict[int, float]] = given) -> bool:
            return budget is None or len(given[budget]) >= n

        found = follow(search, full, given, samples, settled)
        wanted = {b: look.asked for b, look in found.looks.items()}
        if wanted == known:
            return found, rounds
        known = wanted
    raise AssertionError("the search does not end")


def smallest(found: Followed) -> int | None:
    from quest_dist import search

    return search.smallest({b: look.verdict for b, look in found.looks.items()})


def test_it_finds_the_bracket_and_saves_evaluations() -> None:
    right, asked = 0, 0
    for seed in range(50):
        found, _ = searched(drawn(CLEAR, 60, seed), 60)
        lossy = max(b for b, look in found.looks.items() if look.verdict == LOSSY)
        right += (lossy, smallest(found)) == (256, 512)
        asked += sum(look.asked for look in found.looks.values())
    assert right >= 48
    assert asked < 0.75 * 50 * 60 * len(CLEAR)


@pytest.mark.parametrize(
    "losses", [{64: 0.15, 128: 0.15, 256: 0.0}, {64: 0.3, 128: 0.16, 256: 0.15}]
)
def test_a_lossy_budget_is_called_lossless_as_rarely_as_stated(losses: dict[int, float]) -> None:
    search = Search(delta=15.0, confidence=0.9, first_samples=5)
    wrong = 0
    for seed in range(200):
        budget = smallest(searched(drawn(losses, 50, seed), 50, search)[0])
        wrong += budget is not None and losses[budget] >= 0.15
    assert wrong <= 10 + 9  # 200 seeds at 5 %, and three standard deviations


def test_budgets_that_equal_full_are_rarely_called_lossy_and_losers_never_lossless() -> None:
    for seed in range(50):
        found, _ = searched(drawn({64: 0.6, 128: 0.6, 256: 0.6}, 60, seed), 60)
        assert smallest(found) is None
    exact, _ = searched(drawn({64: 0.0, 128: 0.0}, 60, 0), 60)
    assert smallest(exact) == 64


def test_too_few_samples_decide_nothing_however_equal() -> None:
    equal = drawn(dict.fromkeys(CLEAR, 0.0), SEARCH.equal_pairs, 0)
    found, _ = searched(equal, SEARCH.equal_pairs - 1)
    assert {look.verdict for look in found.looks.values()} == {UNRESOLVED}
    found, _ = searched(equal, SEARCH.equal_pairs)
    assert {look.verdict for look in found.looks.values()} == {LOSSLESS}


def test_a_larger_budget_that_loses_takes_the_claim_from_smaller_ones() -> None:
    found, _ = searched(drawn({64: 0.0, 128: 0.9, 256: 0.0}, 60, 3), 60)
    assert found.looks[128].verdict == LOSSY
    assert found.looks[64].verdict == PASSED_BY
    assert smallest(found) == 256


def test_what_else_is_known_changes_no_decision() -> None:
    for seed in range(10):
        scores = drawn(CLEAR, 60, seed)
        step_by_step, rounds = searched(scores, 60)
        full = dict.fromkeys(range(60), 100.0)
        assert rounds > 1
        assert follow(SEARCH, full, scores, 60, lambda budget, n: True) == step_by_step


def test_samples_that_failed_are_left_out_of_the_pairs() -> None:
    scores = drawn({64: 0.0, 128: 0.0}, 40, 0)
    full = {s: 100.0 for s in range(40) if s != 3}
    del scores[64][5]
    found = follow(SEARCH, full, scores, 40, lambda budget, n: True)
    assert {b: (look.asked, look.pairs) for b, look in found.looks.items()} == {
        64: (32, 30),
        128: (32, 31),
    }


def test_rungs_double_up_to_all_samples() -> None:
    assert SEARCH.rungs(40) == [8, 16, 32, 40]
    assert SEARCH.rungs(5) == [5]
    first = follow(SEARCH, {}, {64: {}}, 40, lambda budget, n: False)
    assert (first.looks[64].verdict, first.looks[64].asked, first.asked) == (OPEN, 8, 8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"delta": 0.0}, r"search.delta=0: .* above 0 and below 100"),
        ({"delta": -1.0}, r"search.delta=-1"),
        ({"delta": 100.0}, r"search.delta=100"),
        ({"delta": 2.0, "confidence": 1.0}, r"search.confidence=1: must be at least 0.5"),
        ({"delta": 2.0, "first_samples": 0}, r"search.first_samples=0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Search(**settings).check()  # type: ignore[arg-type]
