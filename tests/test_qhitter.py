"""Oracles of Q-Hitter: its quantiser, the copies it attends to, and what it evicts."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from cache_harness import Run, Stream, decode, no_rotation, tokens_of
from torch import Tensor

from quest_dist import ops
from quest_dist.batch import Group, new_batch
from quest_dist.methods.h2o import H2O
from quest_dist.methods.qhitter import QHitter
from quest_dist.methods.rounded_pages import rounded

S = 4


def run(stream: Stream, budgets: list[int], prefix: int, **settings: object) -> Run:
    return decode(stream, lambda: QHitter(**settings), budgets, prefix=prefix, page_size=S)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_a_vector_is_off_by_half_a_step_at_most(bits: int) -> None:
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(bits)) * 3 + 1
    near, errors = rounded(x, bits)
    step = (x.amax(-1) - x.amin(-1)) / (2**bits - 1)
    assert bool(((near - x).abs() <= step[:, None] * 0.5001).all())
    assert torch.allclose(errors, (near - x).norm(dim=-1), atol=1e-4)
    again, _ = rounded(near, bits)
    assert torch.allclose(again, near, atol=1e-5)


def test_vectors_of_one_sign_keep_their_spread() -> None:
    x = torch.linspace(100, 101, 16)[None]  # a zero point clamped to the codes would lose them all
    near, errors = rounded(x, 4)
    assert torch.allclose(near, x, atol=1e-4)
    assert float(errors) < 1e-3


def test_constant_and_two_valued_vectors_are_exact_and_halves_go_to_even() -> None:
    for values in ([3.0, 3.0, 3.0], [-1.0, 5.0, 5.0]):
        near, errors = rounded(torch.tensor([values]), 1)
        assert torch.allclose(near, torch.tensor([values]), atol=1e-5)
        assert float(errors) < 1e-5
    near, _ = rounded(torch.tensor([[0.0, 1.0, 2.0, 6.0]]), 2)
    assert near.tolist() == [[0.0, 0.0, 2.0, 6.0]]


def test_more_bits_err_less_and_sixteen_not_at_all() -> None:
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    means = [float(rounded(x, bits)[1].mean()) for bits in (2, 3, 4, 8)]
    assert all(before > 1.8 * after for before, after in pairwise(means))
    near, errors = rounded(x, 16)
    assert torch.equal(near, x)
    assert not errors.any()


def test_all_weight_on_attention_in_sixteen_bits_is_h2o() -> None:
    stream = Stream.random(90, layers=2)
    for score_init in ("decode_only", "prompt"):
        settings = {"score_init": score_init, "recent_share": 0.25}
        ours = run(stream, [9, 25], 60, bits=16, attention_weight=1.0, **settings)
        h2o = decode(stream, lambda s=settings: H2O(**s), [9, 25], prefix=60, page_size=S)
        assert torch.equal(ours.outputs, h2o.outputs)
        assert torch.equal(
            run(stream, [9, 25], 60, bits=16, attention_share=0.75, **settings).outputs,
            h2o.outputs,
        )


def test_without_errors_nothing_is_easier_to_keep_and_with_them_something_is() -> None:
    stream = Stream.random(90)
    h2o = decode(stream, lambda: H2O(recent_share=0.25), [9, 25], prefix=60, page_size=S)
    assert torch.equal(run(stream, [9, 25], 60, bits=16).outputs, h2o.outputs)
    half, none = (
        [tokens_of(step, 0, 0) for step in run(stream, [25], 60, attention_weight=w).steps[1:]]
        for w in (0.5, 1.0)
    )
    assert half != none


def test_four_bits_are_what_differs_from_h2o_on_the_same_quantiser() -> None:
    stream = Stream.random(70)
    exact, coarse = (run(stream, [200], 60, bits=bits) for bits in (16, 4))
    dense = decode(stream, H2O, [200], prefix=60, page_size=S)
    assert torch.equal(exact.outputs, dense.outputs)
    error = (coarse.outputs - dense.outputs).norm() / dense.outputs.norm()
    assert 0.005 < float(error) < 0.2


def test_without_weight_and_share_attention_does_not_matter() -> None:
    first, second = Stream.random(80), Stream.random(80)
    second.q[:] = Stream.random(80, seed=9).q
    settings = {"attention_weight": 0.0, "attention_share": 0.0}
    sets = [
        [tokens_of(step, 0, head) for step in run(stream, [12], 60, **settings).steps[1:]]
        for stream in (first, second)
        for head in (0, 3)
    ]
    assert sets[:2] == sets[2:]
    plain = [
        [tokens_of(step, 0, 0) for step in run(stream, [12], 60).steps[1:]]
        for stream in (first, second)
    ]
    assert plain[0] != plain[1]


def quantised(stream: Stream) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values [G, T, D] in four bits, and errors [2, G, T]."""
    (k, of_keys), (v, of_values) = rounded(stream.k[0], 4), rounded(stream.v[0], 4)
    return k, v, torch.stack((of_keys, of_values))


def scaled(x: Tensor) -> Tensor:
    return (x - x.min()) / (x.max() - x.min())


@pytest.mark.parametrize("prefix", [58, 60])
def test_the_first_cut_by_brute_force(prefix: int) -> None:
    stream = Stream.random(prefix + 2)
    result = run(stream, [17, 3], prefix)
    k, v, errors = quantised(stream)
    length = prefix + 1
    q = stream.q[0, :, prefix]
    shares = torch.einsum("hd,hld->hl", q, k[:, :length].repeat_interleave(2, 0)) * 0.25
    shares = shares.softmax(-1)
    expected = torch.einsum("hl,hld->hd", shares, v[:, :length].repeat_interleave(2, 0))
    assert torch.allclose(result.outputs[0, 0, 0], expected, atol=1e-5)
    attention = shares.view(2, 2, length).sum(1)
    ease = torch.empty(2, length)
    context = errors[:, :, :prefix]
    scale = torch.stack([scaled(each) for each in context])
    ease[:, :prefix] = 1 - scale.mean(0)
    wider = torch.stack([scaled(each[:, :length])[:, -1] for each in errors])
    ease[:, prefix] = 1 - wider.mean(0)
    ranks = 0.5 * scaled(attention) + 0.5 * ease
    for row, (recent, heavy, rest) in enumerate([(4, 5, 7), (0, 0, 2)]):
        for group in range(2):
            older = range(length - recent)
            most = sorted(older, key=lambda t, g=group: (-attention[g, t], -t))[:heavy]
            left = [t for t in older if t not in most]
            best = sorted(left, key=lambda t, g=group: (-ranks[g, t], -t))[:rest]
            kept = {*most, *best, *range(length - recent, length)}
            assert set(tokens_of(result.steps[1], row, 2 * group)) == kept | {length}


@pytest.mark.parametrize("prefix", [1, S - 1, S, 2 * S + 1, 30])
def test_it_attends_to_rounded_copies_wherever_pages_begin(prefix: int) -> None:
    stream = Stream.random(prefix + 9, layers=2)
    result = run(stream, [5, 100, 7], prefix)
    view = result.steps[-1].view
    pages = result.batch.groups[0].method._rounded
    k, v = ops.gather(pages.kv(1), view.page_table, prefix + 9)
    for row in range(3):
        assert torch.equal(k[row], rounded(stream.k[1], 4)[0])
        assert torch.equal(v[row], rounded(stream.v[1], 4)[0])


def test_rows_of_other_texts_have_their_own_copies_and_ranges() -> None:
    streams = [Stream.random(60, seed=1), Stream.random(60, seed=2)]
    streams[1].k *= 40.0

    def outputs(chosen: list[Stream]) -> Tensor:
        group = Group(QHitter(), [12] * len(chosen), 0)
        batch = new_batch(chosen[0].geometry, S, [group], len(chosen), no_rotation)
        found = []
        for tokens in (slice(0, 50), *(slice(t, t + 1) for t in range(50, 60))):
            q, k, v = (
                torch.stack([getattr(one, part)[0, :, tokens] for one in chosen]) for part in "qkv"
            )
            batch.write(0, k, v, None)
            found.append(batch.attend(0, q, k, v, 0.25)[:, -1])
        return torch.stack(found[1:])

    together = outputs(streams)
    for row, stream in enumerate(streams):
        assert torch.equal(together[:, row], outputs([stream])[:, 0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 9}, "bits=9: choose one of 1, 2, 3, 4, 5, 6, 7, 8, 16"),
        ({"attention_weight": 1.5}, r"attention_weight=1\.5: choose a number from 0 to 1"),
        ({"attention_share": 0.8}, r"attention_share=0\.8: with recent_share=0\.25 it is more"),
        ({"score_init": "now"}, "score_init='now'"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QHitter(**settings)
