"""Oracles of SnapKV: what its window keeps, by votes, pooling and ties; the context is cut once."""

from __future__ import annotations

import pytest
import torch
from cache_harness import Run, Stream, decode, tokens_of

from quest_dist.methods.snapkv import SnapKV
from quest_dist.methods.tova import Tova
from quest_dist.methods.traffic import CacheShape

S = 4


def run(stream: Stream, budgets: list[int], prefix: int, **settings: object) -> Run:
    chunks = settings.pop("chunks", None)
    made = {"window": 6, "kernel": 3, **settings}
    return decode(
        stream, lambda: SnapKV(**made), budgets, prefix=prefix, page_size=S, chunks=chunks
    )


def votes(stream: Stream, prefix: int, window: int) -> torch.Tensor:
    """[G, prefix - window]: by the definition, in float64."""
    q, k = (part[0].double() for part in (stream.q, stream.k))
    group = q.shape[0] // k.shape[0]
    scores = torch.einsum("hnd,hld->hnl", q[:, :prefix], k[:, :prefix].repeat_interleave(group, 0))
    scores = scores * q.shape[-1] ** -0.5
    seen = torch.ones(prefix, prefix, dtype=torch.bool).tril()
    shares = scores.masked_fill(~seen, -torch.inf).softmax(-1)[:, -window:]
    return shares.sum(1).view(k.shape[0], group, prefix).mean(1)[:, : prefix - window]


@pytest.mark.parametrize("pooling", ["max", "avg"])
@pytest.mark.parametrize("kernel", [1, 5])
def test_it_keeps_the_window_and_the_highest_pooled_votes(kernel: int, pooling: str) -> None:
    stream, prefix = Stream.random(62), 60
    result = run(stream, [20], prefix, kernel=kernel, pooling=pooling)
    older = votes(stream, prefix, 6)
    padded = torch.nn.functional.pad(older, (kernel // 2, kernel // 2))
    near = padded.unfold(1, kernel, 1)  # zeros at the ends count, and no vote is below zero
    pooled = near.amax(2) if pooling == "max" else near.sum(2) / kernel
    for head in range(4):
        best = sorted(range(54), key=lambda j, g=head // 2: (-pooled[g, j], -j))[:14]
        expected = {*best, *range(54, 60)}
        assert set(tokens_of(result.steps[0], 0, head)) == expected | {60}
        assert set(tokens_of(result.steps[1], 0, head)) == expected | {60, 61}


def test_all_that_comes_after_the_context_is_kept() -> None:
    result = run(Stream.random(90), [10, 33], 50)
    first = [set(tokens_of(result.steps[0], row, 3)) for row in range(2)]
    for number, step in enumerate(result.steps):
        for row, budget in enumerate([10, 33]):
            tokens = set(tokens_of(step, row, 3))
            assert tokens == first[row] | set(range(50, 51 + number))
            assert len(tokens) == budget + number + 1


def test_ties_keep_the_newer() -> None:
    stream = Stream.random(41)
    stream.q[:] = 0.0  # every token before the window gets the same votes
    result = run(stream, [15], 40)
    assert tokens_of(result.steps[0], 0, 0) == list(range(25, 41))


@pytest.mark.parametrize("pooling", ["max", "avg"])
def test_a_spike_keeps_its_neighbours_with_it(pooling: str) -> None:
    stream = Stream.random(61)
    stream.k[:, :, 20] = 4.0 * stream.q[:, ::2, 50:60].mean(2)
    stream.q[:, :, 54:60] = stream.q[:, ::2, 50:60].mean(2).repeat_interleave(2, 1)[:, :, None]
    kept = {}
    for kernel in (1, 5):
        result = run(stream, [11], 60, kernel=kernel, pooling=pooling)
        kept[kernel] = set(tokens_of(result.steps[0], 0, 1))
    assert set(range(54, 60)) <= kept[1] & kept[5]
    assert set(range(18, 23)) <= kept[5]
    assert 20 in kept[1]
    assert not set(range(18, 23)) <= kept[1]


def test_average_pooling_divides_by_the_padding_too_or_not() -> None:
    seen = torch.tensor([[4.0, 0, 0, 0, 4.0, 9.0]])
    counted, left_out = (
        SnapKV(window=1, kernel=3, pooling="avg", count_include_pad=c)._pooled(seen)
        for c in (True, False)
    )
    assert torch.allclose(counted[0], torch.tensor([4 / 3, 4 / 3, 0, 4 / 3, 4 / 3, 0]))
    assert torch.allclose(left_out[0], torch.tensor([2, 4 / 3, 0, 4 / 3, 2, 0]))


@pytest.mark.parametrize("chunks", [[58, 1, 1], [50, 4, 3, 3], [2] * 30])
def test_the_window_may_lie_in_several_chunks(chunks: list[int]) -> None:
    stream = Stream.random(61)
    whole, parts = run(stream, [17], 60), run(stream, [17], 60, chunks=chunks)
    for head in range(4):
        assert tokens_of(whole.steps[0], 0, head) == tokens_of(parts.steps[0], 0, head)


def test_one_query_without_pooling_is_tovas_first_cut() -> None:
    stream = Stream.random(61, heads=4, kv_heads=1)
    stream.k[:, 0, 59] = 3.0 * stream.q[:, :, 59].mean(1)  # TOVA does not protect the last token
    ours = run(stream, [16], 60, window=1, kernel=1)
    theirs = decode(stream, Tova, [17], prefix=60, page_size=S)
    assert 59 in tokens_of(theirs.steps[0], 0, 0)
    assert set(tokens_of(ours.steps[0], 0, 0)) == set(tokens_of(theirs.steps[0], 0, 0))


def test_kv_heads_choose_by_themselves() -> None:
    result = run(Stream.random(61), [16], 60)
    assert tokens_of(result.steps[0], 0, 0) == tokens_of(result.steps[0], 0, 1)
    assert tokens_of(result.steps[0], 0, 1) != tokens_of(result.steps[0], 0, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kernel": 4}, "kernel=4: choose an odd number"),
        ({"kernel": 0}, "kernel=0: choose an odd number"),
        ({"window": 0}, "window=0: at least 1"),
        ({"pooling": "mean"}, "pooling='mean': choose one of max, avg"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SnapKV(**settings)


def test_a_budget_below_the_window_is_refused() -> None:
    with pytest.raises(ValueError, match="budget=31: snapkv with window=32 needs at least 32"):
        SnapKV().check_budget(31, 16)
    SnapKV().check_budget(32, 16)


def test_what_it_holds_grows_with_what_is_decoded() -> None:
    result = run(Stream.random(70), [16, 80], 60)
    shape = CacheShape(kv_heads=2, head_dim=16, element_bytes=4, page_size=S)
    [cut, whole] = result.batch.measured
    assert cut.bytes_held == cut.bytes_moved == sum(range(17, 27)) * shape.token_bytes
    assert whole.bytes_held == whole.bytes_moved == sum(range(61, 71)) * shape.token_bytes
