"""The Hugging Face patch: exact with `full`, undone afterwards, padding, limits, and the methods
inside a real model."""

from __future__ import annotations

import pytest
import torch
from cache_harness import METHODS, asked_for, is_exact, method_spec
from tiny_models import KINDS, tiny
from transformers import GPT2Config, GPT2LMHeadModel

import quest_dist
from quest_dist.attention import ATTENTION, left_padding

PROMPT = torch.randint(1, 97, (1, 50), generator=torch.Generator().manual_seed(5))


def generate(
    model: torch.nn.Module, prompt: torch.Tensor = PROMPT, **options: object
) -> torch.Tensor:
    """Twelve greedy tokens after the prompt."""
    prompt = prompt.to(model.device)
    mask = options.pop("attention_mask", torch.ones_like(prompt)).to(model.device)
    out = model.generate(prompt, attention_mask=mask, max_new_tokens=12, do_sample=False, **options)
    return out[:, prompt.shape[1] :]


@pytest.mark.parametrize("kind", KINDS)
def test_full_gives_the_tokens_and_logits_of_the_unpatched_model(kind: str, place: str) -> None:
    model, prompt = tiny(kind).to(place), PROMPT.to(place)
    expected = generate(model)
    logits = model(prompt).logits
    with quest_dist.patched(model, page_size=8):
        assert torch.equal(generate(model), expected)
        assert torch.allclose(model(prompt).logits, logits, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in METHODS if is_exact(name)])
def test_an_ample_budget_gives_the_tokens_of_the_unpatched_model(name: str) -> None:
    model = tiny()
    with quest_dist.patched(model, **asked_for(name, 1000), page_size=8):
        patched = generate(model)
    assert torch.equal(patched, generate(model)) or not method_spec(name).build().exact


@pytest.mark.parametrize("name", [name for name in METHODS if name != "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_small_budget_changes_the_attention_and_stays_finite(
    name: str, dtype: torch.dtype
) -> None:
    model = tiny(dtype=dtype)
    with quest_dist.patched(model, **asked_for(name, 8), page_size=4, dense_layers=1):
        cache = model(PROMPT).past_key_values
        logits = [model(PROMPT[:, i : i + 1], past_key_values=cache).logits for i in range(4)]
    dense = model(PROMPT).past_key_values
    reference = [model(PROMPT[:, i : i + 1], past_key_values=dense).logits for i in range(4)]
    assert all(bool(step.isfinite().all()) for step in logits)
    assert not torch.allclose(logits[-1], reference[-1], atol=1e-3)
    measured = cache.batch.measured[0]
    assert measured.steps == 4
    assert measured.planned_low <= measured.attended <= measured.planned_high


def test_leaving_restores_everything_also_after_an_exception() -> None:
    model = tiny()
    before = model.config._attn_implementation
    hooks = len(model._forward_hooks), len(model._forward_pre_hooks)
    with quest_dist.patched(model, "quest", 16):
        assert model.config._attn_implementation == ATTENTION
    assert model.config._attn_implementation == before
    with pytest.raises(RuntimeError, match="stop"), quest_dist.patched(model, "quest", 16):
        raise RuntimeError("stop")
    assert model.config._attn_implementation == before
    assert (len(model._forward_hooks), len(model._forward_pre_hooks)) == hooks
    assert type(model(PROMPT).past_key_values).__name__ == "DynamicCache"


def test_two_models_and_two_caches_do_not_mix() -> None:
    first, second = tiny(), tiny("qwen2", num_hidden_layers=2)
    expected = generate(first), generate(second)
    with quest_dist.patched(first), quest_dist.patched(second):
        caches = [model(PROMPT).past_key_values for model in (first, second)]
        for model, cache, tokens in zip((first, second), caches, expected, strict=True):
            token = model(tokens[:, :1], past_key_values=cache).logits[:, -1].argmax(-1)
            assert int(token) == int(tokens[0, 1])
        with pytest.raises(ValueError, match="patched already"), quest_dist.patched(first):
            pass


@pytest.mark.parametrize("name", METHODS)
def test_a_left_padded_row_equals_the_unpadded_one(name: str, place: str) -> None:
    model = tiny().to(place)
    padded = torch.cat([PROMPT, torch.nn.functional.pad(PROMPT[:, :39], (11, 0))])
    mask = (torch.arange(50) >= torch.tensor([[0], [11]])).long()
    with quest_dist.patched(model, **asked_for(name, 12), page_size=4, dense_layers=1):
        both = generate(model, padded, attention_mask=mask)
        alone = [generate(model), generate(model, PROMPT[:, :39])]
    assert torch.equal(both, torch.cat(alone))


@pytest.mark.parametrize("name", METHODS)
def test_conversation_goes_on_after_a_second_prompt(name: str) -> None:
    model = tiny()
    with quest_dist.patched(model, **asked_for(name, 12), page_size=4, dense_layers=1):
        cache = model(PROMPT[:, :30]).past_key_values
        model(PROMPT[:, 30:31], past_key_values=cache)
        model(PROMPT[:, 31:45], past_key_values=cache)
        logits = model(PROMPT[:, 45:46], past_key_values=cache).logits
    assert bool(logits.isfinite().all())
    if name == "full":
        assert torch.allclose(logits, model(PROMPT[:, :46]).logits[:, -1:], atol=1e-4)


def test_streaming_rolling_positions_turn_the_query_as_rotary_does() -> None:
    model = tiny()
    with quest_dist.patched(model, "streaming", 12, positions="rolling", dense_layers=0):
        patch = model._forward_pre_hooks[next(reversed(model._forward_pre_hooks))].__self__
        q = torch.randn(2, 4, 16)
        there = patch.rotate(q, torch.tensor([7, 300]))
        back = patch.rotate(there, torch.tensor([-7, -300]))
        generate(model)
    assert torch.allclose(back, q, atol=1e-5)
    assert not torch.allclose(there, q, atol=1e-2)


def test_sliding_window_models_refuse_to_outgrow_it() -> None:
    model = tiny("mistral", sliding_window=40)
    with quest_dist.patched(model), pytest.raises(ValueError, match="sliding window of 40"):
        model(PROMPT)


def test_models_without_the_attention_interface_are_named() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=97))
    model._supports_attention_backend = False
    with pytest.raises(ValueError, match="GPT2LMHeadModel"), quest_dist.patched(model):
        pass


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("qest", 8), "did you mean 'quest'"),
        (("quest",), "needs a budget"),
        (("full", 8), "has no budget"),
        (("quest", 0), "budget=0"),
        (("quest", 64.5), "budget=64.5: expected a whole number of at least 1"),
        (("quest", "64"), "budget='64': expected a whole number"),
        (("quest", 64, 0), "page_size=0: expected a whole number of at least 1"),
        (("quest", 64, 16, -1), "dense_layers=-1: expected a whole number of at least 0"),
        (("quest", 64, 16, 5), "dense_layers=5: the model has 4 layers"),
        (("streaming", 3), "needs at least 5"),
        (("kvquant3", 64), "'kvquant3' has no budget"),
        (("kvquant3",), r"needs artefact=FILE, .* python -m quest_dist.calibrate kvquant3 --out"),
    ],
)
def test_wrong_arguments_are_named(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message), quest_dist.patched(tiny(), *arguments):
        pass


def test_beam_search_and_no_cache_are_refused() -> None:
    model = tiny()
    with quest_dist.patched(model):
        with pytest.raises(ValueError, match="beam"):
            generate(model, num_beams=2)
        with pytest.raises(ValueError, match="use_cache=False"):
            model(PROMPT, use_cache=False)


def test_padding_on_the_right_is_refused() -> None:
    with pytest.raises(ValueError, match="pad on the left"):
        left_padding(torch.tensor([[1, 1, 0]]), 3)
    assert left_padding(torch.tensor([[0, 1, 1], [1, 1, 1]]), 3) == [1, 0]
    assert left_padding(torch.ones(2, 3), 3) is None
