"""Quest's own oracles: forced current page, partial pages, page counts, the needle, the released
evaluation's defects."""

from __future__ import annotations

import pytest
import torch
from cache_harness import Stream, decode, method_spec, tokens_of

from quest_dist.methods.quest import Quest, pages_to_keep, tokens_in_pages
from quest_dist.methods.tightbound import TightBound

S = 4


@pytest.mark.parametrize("length", [S * 5 - 1, S * 5, S * 5 + 1])
def test_current_page_is_always_attended(length: int) -> None:
    stream = Stream.random(length)
    # Keys of the current page that no query likes.
    stream.k[:, :, (length - 1) // S * S :] = 0.0
    result = decode(stream, Quest, [2 * S], prefix=length - 1, page_size=S)
    first = (length - 1) // S * S
    for head in range(4):
        tokens = tokens_of(result.steps[0], 0, head)
        assert tokens[-(length - first) :] == list(range(first, length))
        assert len(tokens) == S + length - first == tokens_in_pages(length, 2 * S, S)


def test_budget_below_one_page_means_the_current_page_only() -> None:
    result = decode(Stream.random(30), Quest, [1], prefix=29, page_size=S)
    assert tokens_of(result.steps[0], 0, 0) == [28, 29]


@pytest.mark.parametrize("name", ["quest", "tightbound", "oracle_page", "quest_kivi4"])
def test_a_sweep_refuses_a_budget_that_the_current_page_exceeds(name: str) -> None:
    method = method_spec(name).build()
    with pytest.raises(ValueError, match=r"^budget=15: pages of page_size=16 .* at least 16 to"):
        method.check_layers(15, 16)
    method.check_layers(16, 16)


def test_eval_compat_takes_its_three_pages_from_any_budget() -> None:
    Quest(variant="eval_compat").check_layers(1, 16)


def test_budget_of_the_length_is_dense_although_its_pages_are_fewer() -> None:
    assert pages_to_keep(100, 100, 16) == -1
    assert pages_to_keep(101, 100, 16) == 6


@pytest.mark.parametrize("length", [3 * S - 1, 4 * S - 1, 10 * S - 1, 10 * S])
def test_eval_compat_drops_a_page_above_the_length_as_the_released_code_does(length: int) -> None:
    def method() -> Quest:
        return Quest(variant="eval_compat")

    result = decode(Stream.random(length), method, [10 * length], prefix=length - 1, page_size=S)
    tokens = tokens_of(result.steps[0], 0, 0)
    pages = -(-length // S)
    kept = {token // S for token in tokens}
    drops = length % S != 0 and pages >= 4
    assert len(kept) == (pages - 1 if drops else pages)


def test_eval_compat_keeps_three_pages_at_least_and_may_drop_the_current_one() -> None:
    stream = Stream.random(41)
    stream.k[:, :, 40:] = 0.0

    def method() -> Quest:
        return Quest(variant="eval_compat")

    result = decode(stream, method, [S], prefix=40, page_size=S)
    heads = [tokens_of(result.steps[0], 0, head) for head in range(4)]
    assert all(len({token // S for token in tokens}) == 3 for tokens in heads)
    assert any(40 not in tokens for tokens in heads)


@pytest.mark.parametrize("method", [Quest, TightBound])
@pytest.mark.parametrize("place", [3, 17, 40])
def test_a_planted_needle_is_found_with_two_pages(method: type[Quest], place: int) -> None:
    stream = Stream.random(66, heads=2, kv_heads=2)
    query = stream.q[:, :, -1]
    stream.k[:, :, place] = 40.0 * query / query.norm(dim=-1, keepdim=True)
    result = decode(stream, method, [2 * S], prefix=65, page_size=S)
    for head in range(2):
        assert place in tokens_of(result.steps[0], 0, head)


def test_page_size_one_selects_what_the_token_oracle_selects() -> None:
    stream = Stream.random(50)
    quest = decode(stream, Quest, [12], prefix=45, page_size=1)
    oracle = decode(stream, method_spec("oracle_token").build, [12], prefix=45, page_size=1)
    for mine, theirs in zip(quest.steps, oracle.steps, strict=True):
        for head in range(4):
            assert tokens_of(mine, 0, head) == tokens_of(theirs, 0, head)


def test_recall_of_the_ten_best_tokens_does_not_fall_with_the_budget() -> None:
    stream = Stream.random(130, seed=3)
    budgets = [8, 16, 32, 64, 128]
    result = decode(stream, Quest, budgets, prefix=129, page_size=S)
    step = result.steps[0]
    scores = step.view.token_scores(step.q)
    for head in range(4):
        best = set(scores[0, head].topk(10).indices.tolist())
        recall = [len(best & set(tokens_of(step, row, head))) for row in range(len(budgets))]
        assert recall == sorted(recall)


def test_tightbound_is_quest_at_half_the_radius() -> None:
    stream = Stream.random(80)
    ours = decode(stream, TightBound, [16], prefix=70, page_size=S)
    knob = decode(stream, lambda: Quest(radius_scale=0.5), [16], prefix=70, page_size=S)
    faithful = decode(stream, Quest, [16], prefix=70, page_size=S)
    assert torch.equal(ours.outputs, knob.outputs)
    assert not torch.equal(ours.outputs, faithful.outputs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gqa": "median"}, "gqa='median': choose one of per_query, max, mean"),
        ({"variant": "paper"}, "variant='paper'"),
        ({"radius_scale": 2.0}, "radius_scale=2.0"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Quest(**settings)
