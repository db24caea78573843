"""The sharing theorem and what else the engine promises: one prefill, one batch, the results of
points run alone."""

from __future__ import annotations

import pytest
import torch
from cache_harness import BUDGETED, METHODS, asked_for, method_spec
from tiny_models import tiny_loaded

import quest_dist
from quest_dist import engine
from quest_dist.plan import Point, Spec
from quest_dist.tasks.task import Sample

TOKENS = torch.randint(1, 97, (80,), generator=torch.Generator().manual_seed(2)).tolist()


def point(name: str, budget: int | None = None, dense_layers: int = 1, **settings: object) -> Point:
    """A point of a method; what it shares with the others does not matter here."""
    blank = Spec("any", {})
    method = method_spec(name, **settings)
    return Point(blank, blank, blank, method, blank, budget, 4, dense_layers, 0)


def sample(**changes: object) -> Sample:
    """Sixty tokens of context, six of tail, eight to generate."""
    facts = {"index": 0, "context": tuple(TOKENS[:60]), "tail": tuple(TOKENS[60:66])}
    return Sample(**{**facts, "answers": ("w1",), "max_new_tokens": 8, **changes})


GRID = [
    point(name, budget if name in BUDGETED else None)
    for budget in (8, 16, 30)
    for name in METHODS
    if name in BUDGETED or budget == 8
]


def test_points_that_share_a_prefill_give_what_they_give_alone(place: str) -> None:
    loaded = tiny_loaded(device=place)
    together = engine.evaluate(loaded, sample(), GRID)
    assert len({result.outcome.token_ids for result in together}) > 4
    for number, result in enumerate(together):
        alone = engine.evaluate(loaded, sample(), [GRID[number]])[0]
        assert alone.outcome.token_ids == result.outcome.token_ids
        assert (alone.attended, alone.read) == (result.attended, result.read)


def test_full_is_greedy_generation_of_the_unpatched_model(place: str) -> None:
    loaded = tiny_loaded(device=place)
    prompt = torch.tensor([TOKENS[:66]], device=place)
    expected = loaded.model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False
    )
    result = engine.evaluate(loaded, sample(), [point("full")])[0]
    assert list(result.outcome.token_ids) == expected[0, 66:].tolist()
    assert result.outcome.text == " ".join(f"w{token}" for token in result.outcome.token_ids)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "full"])
def test_engine_and_patched_generation_agree(name: str, place: str) -> None:
    loaded = tiny_loaded(device=place)
    result = engine.evaluate(loaded, sample(), [point(name, 12 if name in BUDGETED else None)])[0]
    with (
        torch.inference_mode(),
        quest_dist.patched(loaded.model, **asked_for(name, 12), page_size=4, dense_layers=1),
    ):
        fed = torch.tensor([TOKENS], device=place)
        cache = loaded.model(fed[:, :60]).past_key_values
        for at in range(60, 66):
            logits = loaded.model(fed[:, at : at + 1], past_key_values=cache).logits
        tokens = []
        for _ in range(8):
            new = logits[:, -1].argmax(-1, keepdim=True)
            tokens.append(int(new))
            logits = loaded.model(new, past_key_values=cache).logits
    assert list(result.outcome.token_ids) == tokens


def test_rows_that_end_early_leave_without_a_trace(place: str) -> None:
    loaded = tiny_loaded(device=place)
    free = engine.evaluate(loaded, sample(), GRID)
    stop = free[2].outcome.token_ids[3]
    stopped = engine.evaluate(tiny_loaded(eos=stop, device=place), sample(), GRID)
    ends = [result.outcome.token_ids for result in stopped]
    for before, after in zip(free, ends, strict=True):
        tokens = before.outcome.token_ids
        assert after == (tokens[: tokens.index(stop)] if stop in tokens else tokens)
    assert len({len(tokens) for tokens in ends}) > 1


def test_end_of_sequence_as_first_token_gives_an_empty_answer(place: str) -> None:
    loaded = tiny_loaded(device=place)
    first = engine.evaluate(loaded, sample(), [point("full")])[0].outcome.token_ids[0]
    result = engine.evaluate(tiny_loaded(eos=first, device=place), sample(), [point("full")])[0]
    assert result.outcome.token_ids == ()
    assert result.outcome.text == ""


def test_tail_scores_are_the_log_likelihoods_of_the_model(place: str) -> None:
    loaded = tiny_loaded(device=place)
    scored = sample(tail=tuple(TOKENS[60:80]), max_new_tokens=0, score_tail=True)
    full, quest = engine.evaluate(loaded, scored, [point("full"), point("quest", 8)])
    with torch.inference_mode():
        logits = loaded.model(torch.tensor([TOKENS], device=place)).logits[0, 60:79].cpu()
    targets = torch.tensor(TOKENS[61:])
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    assert len(full.outcome.nll) == 19
    assert torch.allclose(torch.tensor(full.outcome.nll), expected, atol=1e-3)
    assert full.outcome.nll != quest.outcome.nll


def test_measured_tokens_are_the_planned_ones(place: str) -> None:
    for result in engine.evaluate(tiny_loaded(device=place), sample(), GRID):
        assert result.planned_low - 1e-6 <= result.attended <= result.planned_high + 1e-6
        assert result.read >= result.attended - 1e-6
        assert result.seconds > 0
        assert result.prefill_seconds > 0


def test_dense_layers_of_all_layers_make_every_method_full(place: str) -> None:
    loaded = tiny_loaded(device=place)
    expected = engine.evaluate(loaded, sample(), [point("full")])[0].outcome.token_ids
    for name in ("quest", "h2o", "tova", "streaming"):
        result = engine.evaluate(loaded, sample(), [point(name, 8, dense_layers=4)])[0]
        assert result.outcome.token_ids == expected


def test_samples_in_any_order_give_the_same(place: str) -> None:
    loaded = tiny_loaded(device=place)
    other = sample(context=tuple(TOKENS[20:80]))
    first = engine.evaluate(loaded, sample(), GRID)
    engine.evaluate(loaded, other, GRID)
    again = engine.evaluate(loaded, sample(), GRID)
    assert [r.outcome for r in first] == [r.outcome for r in again]


def test_a_sample_longer_than_the_model_is_named(place: str) -> None:
    with pytest.raises(ValueError, match="sample 0: 614 tokens with its answer, the model takes"):
        engine.evaluate(tiny_loaded(device=place), sample(context=(1,) * 600), [point("full")])
