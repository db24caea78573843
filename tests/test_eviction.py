"""Oracles of the evicting methods: windows, no resurrection, mass conservation, TOVA's cut, rolling
positions."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from cache_harness import Run, Stream, decode, no_rotation, tokens_of
from torch import Tensor

from quest_dist.batch import Group, new_batch
from quest_dist.methods.h2o import H2O
from quest_dist.methods.streaming import Streaming
from quest_dist.methods.tova import Tova

S = 4


def held(run: Run, row: int, head: int) -> list[set[int]]:
    """Tokens attended, step by step."""
    return [set(tokens_of(step, row, head)) for step in run.steps]


@pytest.mark.parametrize("method", [H2O, lambda: H2O(score_init="prompt"), Tova])
def test_what_is_evicted_never_returns(method: object) -> None:
    run = decode(Stream.random(90), method, [10, 24], prefix=60, page_size=S)
    for row in range(2):
        for head in range(4):
            steps = held(run, row, head)
            for number, (before, after) in enumerate(pairwise(steps)):
                assert after - before == {61 + number}


def test_h2o_without_heavy_hitters_is_a_window() -> None:
    stream = Stream.random(80)
    run = decode(stream, lambda: H2O(recent_share=1.0), [12], prefix=50, page_size=S)
    window = decode(stream, lambda: Streaming(sinks=0), [12], prefix=50, page_size=S)
    assert held(run, 0, 1)[1:] == held(window, 0, 1)[1:]
    assert torch.allclose(run.outputs[1:], window.outputs[1:], atol=1e-6)


def test_h2o_conserves_mass_while_nothing_is_evicted() -> None:
    stream = Stream.random(30)
    method = H2O(score_init="prompt")
    run = decode(stream, lambda: method, [100], prefix=20, page_size=S)
    sums = method._slots[0].score.sum(-1)
    assert torch.allclose(sums, torch.full_like(sums, 30 * 2.0), rtol=1e-5)
    assert len(run.steps) == 10


def test_h2o_sums_the_chunks_of_every_row() -> None:
    stream = Stream.random(44)
    group = Group(H2O(score_init="prompt"), [9, 9], 0)
    batch = new_batch(stream.geometry, S, [group], 2, no_rotation)
    for tokens in (slice(0, 25), slice(25, 40), slice(40, 41)):
        q, k, v = (x[:, :, tokens].expand(2, -1, -1, -1) for x in (stream.q, stream.k, stream.v))
        batch.write(0, k, v, None)
        out = batch.attend(0, q, k, v, 0.25)
    assert torch.equal(out[0], out[1])
    alone = decode(stream, lambda: H2O(score_init="prompt"), [9], prefix=40, page_size=S)
    assert torch.allclose(out[0, -1], alone.outputs[0, 0, 0], atol=1e-5)


def test_h2o_worked_example() -> None:
    """Rows [1], [.6 .4], [.5 .1 .4], [.4 .1 .2 .3] sum to 2.5 .6 .6 .3: with R=1, Hh=1 tokens 0 and
    3 stay."""
    rows = [[1.0], [0.6, 0.4], [0.5, 0.1, 0.4], [0.4, 0.1, 0.2, 0.3]]
    keys = torch.eye(4)
    queries = torch.zeros(4, 4)
    for number, row in enumerate(rows):
        queries[number, : number + 1] = torch.tensor(row).log()
    stream = Stream(
        torch.cat([queries, torch.zeros(1, 4)])[None, None] * 2.0,  # undoes the scale 1/sqrt(4)
        torch.cat([keys, torch.zeros(1, 4)])[None, None],
        torch.zeros(1, 1, 5, 4),
    )
    method = H2O(score_init="prompt")
    run = decode(stream, lambda: method, [3, 4], prefix=4, page_size=S)
    assert tokens_of(run.steps[0], 0, 0) == [0, 3, 4]
    assert tokens_of(run.steps[0], 1, 0) == [0, 2, 3, 4]  # R=1, Hh=2; the tie keeps the newer


def test_h2o_uniform_attention_keeps_the_earliest() -> None:
    stream = Stream.random(41)
    stream.q[:] = 0.0
    run = decode(stream, lambda: H2O(score_init="prompt"), [11], prefix=40, page_size=S)
    assert tokens_of(run.steps[0], 0, 0) == [0, 1, 2, 3, 4, 35, 36, 37, 38, 39, 40]


def test_h2o_recent_window_survives() -> None:
    run = decode(Stream.random(80), H2O, [11], prefix=60, page_size=S)
    for number, step in enumerate(run.steps[1:], 1):
        newest = 60 + number
        assert set(range(newest - 5, newest + 1)) <= set(tokens_of(step, 0, 2))


def test_tova_list_is_one_for_all_heads_and_head_order_does_not_matter() -> None:
    stream = Stream.random(70, heads=4, kv_heads=4)
    order = torch.tensor([2, 0, 3, 1])
    turned = Stream(stream.q[:, order], stream.k[:, order], stream.v[:, order])
    straight = decode(stream, Tova, [9], prefix=50, page_size=S)
    permuted = decode(turned, Tova, [9], prefix=50, page_size=S)
    assert held(straight, 0, 0) == held(straight, 0, 3) == held(permuted, 0, 0)


def test_tova_first_cut_is_the_top_of_the_last_prompt_query() -> None:
    stream = Stream.random(41)
    run = decode(stream, Tova, [10], prefix=40, page_size=S)
    q, k = stream.q[0, :, 39], stream.k[0, :, :40].repeat_interleave(2, 0)
    shares = torch.einsum("hd,hld->hl", q, k).mul(0.25).softmax(-1).mean(0)
    assert set(tokens_of(run.steps[0], 0, 0)) == set(shares.topk(9).indices.tolist()) | {40}


def test_tova_one_below_the_length_drops_the_least_attended() -> None:
    stream = Stream.random(42)
    run = decode(stream, Tova, [41], prefix=40, page_size=S)
    shares = run.steps[0].attended.probabilities[0].mean(0)
    dropped = set(range(41)) - set(tokens_of(run.steps[1], 0, 0))
    assert dropped == {int(shares[:41].argmin())}


@pytest.mark.parametrize("length", [7, 12, 13, 40])
def test_streaming_positions_have_their_closed_form(length: int) -> None:
    run = decode(Stream.random(length + 1), Streaming, [12], prefix=length, page_size=S)
    tokens = tokens_of(run.steps[0], 0, 0)
    newest = length
    if newest + 1 <= 12:
        assert tokens == list(range(newest + 1))
    else:
        assert tokens == [0, 1, 2, 3, *range(newest - 7, newest + 1)]


def test_streaming_modes_agree_before_the_first_eviction_and_differ_after() -> None:
    def rotate(q: Tensor, distance: Tensor) -> Tensor:
        return q * torch.cos(distance.float())[:, None, None]

    stream = Stream.random(40)
    modes = [
        decode(
            stream,
            lambda mode=mode: Streaming(positions=mode),
            [20],
            prefix=10,
            page_size=S,
            rotate=rotate,
        )
        for mode in ("original", "rolling")
    ]
    assert torch.equal(modes[0].outputs[:10], modes[1].outputs[:10])
    assert not torch.equal(modes[0].outputs[12:], modes[1].outputs[12:])


@pytest.mark.parametrize(
    ("method", "budget", "message"),
    [(Streaming, 4, "needs at least 5"), (H2O, 1, "at least 2"), (Tova, 1, "at least 2")],
)
def test_budgets_too_small_are_named(method: type[Tova], budget: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method().check_budget(budget, 16)


def test_h2o_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="score_init='now'"):
        H2O(score_init="now")
    with pytest.raises(ValueError, match="needs score_init='prompt'"):
        H2O(normalise="per_query_count")
