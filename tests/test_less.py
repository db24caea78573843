"""Oracles of LESS: its state, its policies, and the training of its feature maps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cache_harness import Run, Stream, decode, is_exact, method_spec, tokens_of
from tiny_artefacts import artefact_for
from tiny_models import tiny, tiny_loaded
from torch import Tensor

from quest_dist import artefacts, ops
from quest_dist.calibrators import less as calibrator
from quest_dist.methods.less import Less, missing, tokens_at
from quest_dist.methods.low_rank import Maps, State, joined

S = 4
POLICIES = ["less_h2o", "less_window"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def maps(heads: int = 4, kv_heads: int = 2, dim: int = 16, rank: int = 8) -> Maps:
    return Maps(
        normal(heads, dim, 12),
        normal(heads, 12, rank, seed=1),
        normal(kv_heads, dim, 12, seed=2),
        normal(kv_heads, 12, rank, seed=3),
        normal(kv_heads, rank, rank, seed=4),
        normal(kv_heads, 1, rank, seed=5),
        normal(kv_heads, 1, rank, seed=6),
    )


def test_feature_maps_are_those_of_the_paper_and_never_negative() -> None:
    from torch.nn.functional import gelu

    found, q, k = maps(), normal(4, 5, 16, seed=7), normal(2, 6, 16, seed=8)
    phi = gelu(gelu(q[3] @ found.q1[3]) @ found.q2[3]).abs()
    assert torch.allclose(found.phi(q)[3], phi)
    t = found.inner[1].abs() * gelu(gelu(k[1] @ found.k1[1]) @ found.k2[1])
    psi = (t + (t @ found.k3[1]) * found.outer[1]).abs()
    assert torch.allclose(found.psi(k)[1], psi)
    assert bool((found.phi(q) >= 0).all())
    assert bool((found.psi(k) >= 0).all())


def test_the_output_is_the_quotient_of_the_paper() -> None:
    q, k, v = normal(4, 16), normal(2, 9, 16, seed=1), normal(2, 9, 16, seed=2)
    out, lse = normal(4, 16, seed=3), normal(4, seed=4)
    found = maps()
    state = State.of(found, k, v)
    phi = found.phi(q[:, None])[:, 0]
    share = torch.einsum("gir,gnr->gin", phi.view(2, 2, 8), found.psi(k))  # of each evicted token
    top = torch.einsum("gin,gnd->gid", share, v).reshape(4, 16) + lse.exp()[:, None] * out
    expected = top / (share.sum(-1).reshape(4) + lse.exp())[:, None]
    assert torch.allclose(state.joined(phi, out, lse), expected, atol=1e-5)


def test_exact_features_make_it_dense_attention() -> None:
    """Where phi(q) . psi(k_j) is exp(scale q . k_j), what was evicted is not missed."""
    q, k, v = normal(3, 16), normal(1, 20, 16, seed=1), normal(1, 20, 16, seed=2)
    weights = (q @ k[0].T * 0.25).exp()
    held, gone = slice(12, 20), slice(0, 12)
    state = State(v[:, gone], torch.ones(1, 12))  # one-hot keys of rank 12
    out = weights[:, held] / weights[:, held].sum(-1, keepdim=True) @ v[0, held]
    lse = weights[:, held].sum(-1).log()
    dense = (q @ k[0].T * 0.25).softmax(-1) @ v[0]
    assert torch.allclose(state.joined(weights[:, gone], out, lse), dense, atol=1e-5)


@pytest.mark.parametrize("lse", [-300.0, 0.0, 300.0])
def test_a_state_without_mass_leaves_the_output_as_it_is(lse: float) -> None:
    out, high = normal(4, 16), torch.full((4,), lse)
    assert torch.equal(joined(torch.zeros(4, 16), torch.zeros(4), out, high), out)
    some = joined(torch.full((4, 16), 2e-3), torch.full((4,), 1e-3), out, high)
    assert bool(some.isfinite().all())


def test_order_of_eviction_does_not_matter() -> None:
    found, k, v = maps(), normal(2, 30, 16, seed=1), normal(2, 30, 16, seed=2)
    whole = State.of(found, k, v)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    parts = [State.of(found, k[:, one : one + 1], v[:, one : one + 1]) for one in order.tolist()]
    summed = parts[0]
    for part in parts[1:]:
        summed = summed.plus(part)
    assert torch.allclose(summed.hs, whole.hs, rtol=1e-4, atol=1e-4)
    assert torch.allclose(summed.z, whole.z, rtol=1e-4)


def test_what_is_missing_and_its_tokens() -> None:
    before = torch.tensor([[0, 3, 5, 9, 12], [1, 2, 3, 9, 12]], dtype=torch.int32)
    after = torch.tensor([[0, 9, 12], [1, 3, 12]], dtype=torch.int32)
    assert missing(before, after).tolist() == [[3, 5], [2, 9]]
    view = decode(Stream.random(90), method_spec("full").build, [0], prefix=88).steps[-1].view
    k, v = ops.gather(view.kv, view.page_table, 90)
    for positions in (torch.tensor([[3], [89]]), torch.tensor([[3] * 30, [70] * 30])):
        found = tokens_at(view, 0, positions)
        for mine, all_of in zip(found, (k[0], v[0]), strict=True):
            expected = all_of.gather(1, positions[..., None].expand(-1, -1, 16))
            assert torch.equal(mine, expected)


def run(name: str, budgets: list[int], tokens: int, prefix: int, **settings: object) -> Run:
    build = method_spec(name, **settings).build
    return decode(Stream.random(tokens), build, budgets, prefix=prefix, page_size=S)


@pytest.mark.parametrize("score_init", ["prompt", "decode_only"])
def test_h2o_holds_what_h2o_holds(score_init: str) -> None:
    less = run("less_h2o", [12, 24], 70, 50, score_init=score_init)
    h2o = run("h2o", [12, 24], 70, 50, score_init=score_init)
    for one, other in zip(less.steps, h2o.steps, strict=True):
        for row in range(2):
            assert tokens_of(one, row, 2) == tokens_of(other, row, 2)


def test_the_window_holds_what_streaming_holds() -> None:
    less, streaming = (run(name, [12, 24], 70, 50) for name in ("less_window", "streaming"))
    for one, other in zip(less.steps, streaming.steps, strict=True):
        for row in range(2):
            assert tokens_of(one, row, 2) == tokens_of(other, row, 2)


@pytest.mark.parametrize("name", POLICIES)
def test_the_state_is_of_all_tokens_that_are_not_held(name: str) -> None:
    made: list[Less] = []

    def build() -> Less:
        made.append(method_spec(name).build())
        return made[-1]

    result = decode(Stream.random(75), build, [12, 40, 60], prefix=50, page_size=S)
    method, step = made[-1], result.steps[-1]
    keys, values = ops.gather(step.view.kv, step.view.page_table, 75)
    weights = artefacts.read(str(method.artefact))
    layer = Maps(**{field: weights[field][0] for field in Maps._fields})
    for row, budget in enumerate((12, 40, 60)):
        state = method._states[0][row]
        assert state is not None
        position = method._slots[0].position[row, :, : budget - 1].long()
        gone = torch.ones(2, 75, dtype=torch.bool).scatter_(1, position, False)
        for head in range(2):
            k, v = keys[row, head, gone[head]], values[row, head, gone[head]]
            psi = layer.psi(k.expand(2, -1, -1))[head]
            assert torch.allclose(state.hs[head], psi.T @ v, rtol=1e-4, atol=1e-7)
            assert torch.allclose(state.z[head], psi.sum(0), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", POLICIES)
def test_with_features_of_zero_it_is_its_policy(name: str, tmp_path: Path) -> None:
    assert is_exact(name)
    method = method_spec(name).build()
    blank = {
        field: torch.zeros_like(weight)
        for field, weight in artefacts.read(
            str(artefact_for(method, Stream.random(1).geometry))
        ).items()
    }
    place = tmp_path / "blank.safetensors"
    artefacts.write(blank, artefacts.recipe("less", vars(method), {}, ""), place)

    def output(build: Callable[[], Less]) -> Tensor:
        return decode(Stream.random(70), build, [12, 24], prefix=50, page_size=S).outputs

    less = output(_with_artefact(name, place))
    policy = {"less_h2o": ("h2o", {"score_init": "prompt"}), "less_window": ("streaming", {})}[name]
    assert torch.equal(less, output(method_spec(policy[0], **policy[1]).build))
    assert not torch.equal(less, output(method_spec(name).build))


def _with_artefact(name: str, place: Path) -> Callable[[], Less]:
    """A method whose artefact the harness leaves as it is."""

    def build() -> Less:
        method: Less = method_spec(name).build()
        method._maps_of = lambda view: Maps(  # type: ignore[method-assign]
            **{field: weight[0] for field, weight in artefacts.read(str(place)).items()}
        )
        return method

    return build


SETTINGS = {"policy": "h2o", "sinks": 4, "recent_share": 0.5, "rank": 4, "hidden": 8, "epochs": 24}


@pytest.mark.parametrize("policy", ["h2o", "window"])
def test_training_brings_attention_nearer_to_the_dense_one(policy: str) -> None:
    loaded = tiny_loaded()
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 97, (6, 128), generator=draw)
    settings = {**SETTINGS, "policy": policy}
    made = calibrator.make(loaded, tokens, settings)
    assert made["q1"].shape == (4, 4, 16, 8)
    assert made["k2"].shape == (4, 2, 8, 4)
    again = calibrator.make(loaded, tokens, settings)
    assert all(torch.equal(made[name], again[name]) for name in made)
    nearer = [
        calibrator.loss_of(Maps(**{n: w[layer] for n, w in made.items()}), batch, projection)
        / calibrator.loss_of(_none(), batch, projection)
        for layer, (batch, projection) in enumerate(_examples(policy))
    ]
    assert max(nearer) < 1.0
    assert sum(nearer) / len(nearer) < 0.97


def _none() -> Maps:
    return Maps(*(torch.zeros_like(weight) for weight in maps(rank=4)))


def _examples(policy: str) -> list[tuple[list[calibrator.Example], Tensor]]:
    """Sequences of other tokens, as the training sees them."""
    from quest_dist.attention_inputs import seen

    model, found = tiny(), {}
    tokens = torch.randint(1, 97, (4, 128), generator=torch.Generator().manual_seed(9))
    rule = calibrator.Policy(policy, 4, 0.5)

    def see(layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        mine = found.setdefault(layer, [])
        mine.append(calibrator.example(q[0], k[0], v[0], 0.25, rule, len(mine)))

    with torch.no_grad(), seen(model, see):
        for row in tokens:
            model(row[None], use_cache=False)
    weights = [
        module.o_proj.weight.detach() for module in calibrator.attention_modules(model).values()
    ]
    return [(found[layer], weights[layer]) for layer in sorted(found)]


@pytest.mark.parametrize("policy", ["h2o", "window"])
def test_an_example_is_dense_attention_parted_in_held_and_gone(policy: str) -> None:
    q, k, v = normal(4, 128, 16), normal(2, 128, 16, seed=1), normal(2, 128, 16, seed=2)
    one = calibrator.example(q, k, v, 0.25, calibrator.Policy(policy, 4, 0.5), 0)
    cuts = [30, 62, 94, 126]
    assert one.q.shape == (4, 4, 2, 16)
    for place, cut in enumerate(cuts):
        budget = max(cut // calibrator.DIVISORS[place], 6)
        assert one.gone[place].sum(-1).tolist() == [cut - budget] * 2
    score = torch.einsum("hd,htd->ht", q[:, 127], k.repeat_interleave(2, 0)) * 0.25
    dense = torch.einsum("ht,htd->hd", score.softmax(-1), v.repeat_interleave(2, 0))
    assert torch.allclose(one.dense[3, :, 1], dense, atol=1e-5)
    gone = one.gone[3].repeat_interleave(2, 0)
    log_gone = score.masked_fill(~gone, -torch.inf).logsumexp(-1)
    share = (log_gone - score.logsumexp(-1)).exp()[:, None]
    rest = torch.einsum(
        "ht,htd->hd", score.masked_fill(~gone, -torch.inf).softmax(-1), v.repeat_interleave(2, 0)
    )
    merged = (1 - share) * one.out[3, :, 1] + share * rest
    assert torch.allclose(merged, dense, atol=1e-5)
    if policy == "window":
        assert one.gone[3, 0].nonzero().flatten().tolist() == list(range(4, 126 - 2))


def test_scores_are_what_every_fourth_query_gives() -> None:
    q, k = normal(2, 2, 24, 16), normal(2, 24, 16, seed=1)
    sums = calibrator.received(q[:, :, 0::4], k, 0)
    score = torch.einsum("gitd,gsd->gits", q, k)
    score = score.masked_fill(torch.ones(24, 24).triu(1).bool(), -torch.inf).softmax(-1)
    assert torch.allclose(sums, score[:, :, 0::4].sum((1, 2)), atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy": "tova"}, "policy='tova': choose one of h2o, window"),
        ({"rank": 0}, "rank=0: choose a whole number of at least 1"),
        ({"hidden": 1.5}, "hidden=1.5: choose a whole number"),
        ({"sinks": -1}, "sinks=-1: choose a whole number of at least 0"),
    ],
)
def test_settings_are_checked(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Less(**settings)


def test_budgets_models_and_missing_artefacts_are_named() -> None:
    with pytest.raises(ValueError, match="budget=4: less with sinks=4 needs at least 5"):
        Less(policy="window").check_budget(4, 16)
    with pytest.raises(ValueError, match="budget=1: less needs at least 2"):
        Less().check_budget(1, 16)
    view = decode(Stream.random(30), method_spec("full").build, [0], prefix=28).steps[-1].view
    with pytest.raises(ValueError, match="artefact=null: less needs its feature maps"):
        Less()._maps_of(view)
    other = Less(artefact=artefact_for(Less(), Stream.random(1, heads=2, kv_heads=1).geometry))
    with pytest.raises(ValueError, match=r"made for 1 layers of 2 query and 1 kv heads of 16, not"):
        other._maps_of(view)
    layer = torch.nn.Linear(1, 1)
    layer.layer_idx = 0  # type: ignore[assignment]
    with pytest.raises(ValueError, match="its attention has no o_proj, so LESS cannot be trained"):
        calibrator.attention_modules(torch.nn.Sequential(layer))
