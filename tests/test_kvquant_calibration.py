"""KVQuant's calibration: what is seen of a model, its bounds, its centroids."""

from __future__ import annotations

import pytest
import torch
from nuq_tokens import back_and_forth
from sklearn.cluster import KMeans
from tiny_models import KINDS, tiny, tiny_loaded
from torch import Tensor
from torch.nn.functional import cross_entropy

from quest_dist.attention_inputs import seen, turned
from quest_dist.calibrators import kvquant
from quest_dist.methods.kvquant_blocks import Rules
from quest_dist.nuq import BITS, Codebook

TOKENS = torch.randint(1, 97, (2, 60), generator=torch.Generator().manual_seed(4))
SETTINGS = {"outliers": 0.05, "sinks": 1}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_is_watched_computes_what_it_always_does(kind: str) -> None:
    model, shapes = tiny(kind), {}
    expected = model(TOKENS).logits
    before = model.config._attn_implementation
    with seen(model, lambda layer, q, k, v: shapes.setdefault(layer, (q.shape, k.shape, v.shape))):
        assert torch.allclose(model(TOKENS, use_cache=False).logits, expected, atol=1e-4)
        with pytest.raises(ValueError, match="watched already"), seen(model, print):
            pass
    assert model.config._attn_implementation == before
    assert shapes == dict.fromkeys(range(4), ((2, 4, 60, 16), (2, 2, 60, 16), (2, 2, 60, 16)))
    assert torch.equal(model(TOKENS).logits, expected)


def test_keys_and_gradients_are_those_of_the_projections() -> None:
    """An oracle of its own: hooks on k_proj and v_proj of a Llama, and one backward pass."""
    loaded, projected = tiny_loaded(), {}

    def keep(name: str, out: Tensor) -> None:
        out.retain_grad()
        projected[name] = out

    layers = loaded.model.model.layers
    hooks = [
        getattr(layer.self_attn, f"{x}_proj").register_forward_hook(
            lambda _m, _i, out, name=f"{x}{n}": keep(name, out)
        )
        for n, layer in enumerate(layers)
        for x in "kv"
    ]
    logits = loaded.model(TOKENS[:1], use_cache=False).logits[0]
    cross_entropy(logits[:-1], TOKENS[0, 1:], reduction="sum").backward()
    for hook in hooks:
        hook.remove()
    for number, (k, k_weight, v, v_weight) in enumerate(
        kvquant._observed(loaded, TOKENS[:1], sinks=3)
    ):
        for found, weight, name in ((k, k_weight, "k"), (v, v_weight, "v")):
            out = projected[f"{name}{number}"]
            assert torch.allclose(found, out[0, 3:].view(57, 2, 16), atol=1e-5)
            expected = out.grad[0, 3:].view(57, 2, 16).square()
            assert torch.allclose(weight.float(), expected, rtol=0.01, atol=1e-6)
            assert bool((expected > 0).any())


def test_keys_are_seen_before_rotation_whatever_lies_between() -> None:
    """Qwen3 norms its keys after the projection."""
    loaded = tiny_loaded("qwen3")
    [k, *_], *_ = kvquant._observed(loaded, TOKENS[:1], sinks=0)
    found: list[Tensor] = []
    hook = loaded.model.model.layers[0].self_attn.k_norm.register_forward_hook(
        lambda _m, _i, out: found.append(out)
    )
    loaded.model(TOKENS[:1])
    hook.remove()
    assert torch.allclose(k, found[0][0], atol=1e-5)
    assert torch.allclose(
        turned(loaded.model, turned(loaded.model, k, torch.arange(60)), -torch.arange(60)),
        k,
        atol=1e-5,
    )


def test_bounds_leave_out_what_they_say_and_forget_the_order_of_tokens() -> None:
    k = random(1000, 2, 16)
    lower, upper = kvquant.key_bounds(k, 0.02)
    assert ((k < lower).sum(0) == 10).all()
    assert ((k > upper).sum(0) == 10).all()
    mixed = k[torch.randperm(1000, generator=torch.Generator().manual_seed(1))]
    assert all(map(torch.equal, kvquant.key_bounds(mixed, 0.02), (lower, upper)))
    lower, upper = kvquant.key_bounds(k, 0.0)
    assert torch.equal(lower, k.amin(0))
    assert torch.equal(upper, k.amax(0))


@pytest.mark.parametrize("bits", BITS)
def test_equal_weights_are_no_weights(bits: int) -> None:
    x = random(500, seed=bits).clamp(-1, 1)
    plain = KMeans(1 << bits, n_init=kvquant.STARTS, random_state=0).fit(x[:, None].double())
    expected = torch.from_numpy(plain.cluster_centers_).flatten().sort().values.float()
    for weight in (1.0, 7.5):
        found = kvquant.centroids(x, torch.full((500,), weight), bits)
        assert torch.allclose(found, expected, atol=1e-4)


def test_weights_pull_centroids_and_few_numbers_are_all_kept() -> None:
    x = torch.linspace(-1, 1, 200)
    weights = torch.where(x > 0, 100.0, 1.0)
    assert int((kvquant.centroids(x, weights, 3) > 0).sum()) > 5
    assert int((kvquant.centroids(x, torch.ones(200), 3) > 0).sum()) == 4
    few = torch.tensor([0.5, -1.0, 0.5, 0.25])
    assert kvquant.centroids(few, torch.ones(4), 2).tolist() == [-1.0, 0.25, 0.5, 0.5]
    assert kvquant.centroids(few, torch.tensor([1.0, 0.0, 1.0, 1.0]), 2)[0] == 0.25


def test_bins_move_centroids_by_less_than_their_width() -> None:
    x = random(20_000, seed=3).div(3).clamp(-1, 1)
    weights = random(20_000, seed=4).square()
    fitted = kvquant._fitted(x, weights)
    for bits in BITS:
        whole = kvquant.centroids(x, weights, bits).double()

        def loss(found: Tensor) -> float:
            nearest = (x[:, None] - found.float()).square().amin(1)
            return float((weights * nearest).sum())

        assert loss(fitted[f"{bits}"]) < 1.03 * loss(whole)


def test_an_artefact_ascends_and_quantises_the_text_it_was_made_of_better_than_steps() -> None:
    loaded = tiny_loaded()
    made = kvquant.make(loaded, TOKENS, SETTINGS)
    assert all(bool(tensor.isfinite().all()) for tensor in made.values())
    seen_ = [kvquant._observed(loaded, row[None], 1) for row in TOKENS]
    for layer in range(4):
        k, k_weight, v, v_weight = (torch.cat([s[layer][part] for s in seen_]) for part in range(4))
        bounds = made["lower"][layer], made["upper"][layer]
        previous = float("inf")
        for bits in BITS:
            chosen = [made[f"{x}{bits}"][layer] for x in "kv"]
            for one in chosen:
                assert bool((one[1:] >= one[:-1]).all())
                assert bool((one.abs() <= 1).all())
            errors = []
            for tables in (chosen, [torch.linspace(-1, 1, 1 << bits)] * 2):
                books = [Codebook(one, one) for one in tables]
                keys, values = back_and_forth(k, v.float(), Rules(*bounds, *books, 0.05))
                error_k = (k_weight.float() * (keys - k).square()).sum()
                error_v = (v_weight.float() * (values - v).square()).sum()
                errors.append(float(error_k / k_weight.float().sum() + error_v))
            assert errors[0] < errors[1]
            assert errors[0] < previous
            previous = errors[0]


def test_numbers_that_move_the_loss_more_get_more_centroids() -> None:
    x = random(5000, seed=8).div(3).clamp(-1, 1)
    plain = kvquant._fitted(x, torch.ones(5000))
    pulled = kvquant._fitted(x, torch.where(x > 0, 100.0, 1.0))
    assert int((plain["3"] > 0).sum()) == 4
    assert int((pulled["3"] > 0).sum()) > 5


def test_q_norm_keeps_mean_and_deviation() -> None:
    x = (random(5000, seed=8).div(4) + 0.1).clamp(-1, 1)
    fitted = kvquant._fitted(x, random(5000, seed=9).square())
    for bits in BITS:
        own, moved = fitted[f"{bits}"], fitted[f"{bits}_qnorm"]
        codes = torch.bucketize(x.double(), (own[1:] + own[:-1]) / 2)
        assert float(moved[codes].mean()) == pytest.approx(float(x.mean()), abs=2e-3)
        assert float(moved[codes].std()) == pytest.approx(float(x.std()), abs=2e-3)
        assert float(own[codes].std()) < float(x.std())


def test_where_no_gradient_arrives_all_numbers_weigh_the_same() -> None:
    x = random(300).clamp(-1, 1)
    none, same = kvquant._fitted(x, torch.zeros(300)), kvquant._fitted(x, torch.ones(300))
    assert torch.equal(none["3"], same["3"])
