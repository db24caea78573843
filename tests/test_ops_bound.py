"""Quest's page score: an upper bound of the true scores, tight where it should be."""

from __future__ import annotations

import math

import pytest
import torch
from pools import TOLERANCE, Case, name, shared
from torch import Tensor

from quest_dist import ops

SOME = [Case(d, 3, s) for d in (torch.float32, torch.bfloat16) for s in (1, 8, 16)]
some_cases = pytest.mark.parametrize("case", SOME, ids=name)


def one_page(keys: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A row whose first page holds `keys` [S, D], with a second page that has just begun."""
    size, dim = keys.shape
    kv, meta = ops.allocate_pages(1, 2, 1, size, dim, keys.dtype)
    table = torch.tensor([[0, 1]], dtype=torch.int32)
    tokens = torch.cat((keys, keys[:1])).view(1, 1, size + 1, dim)
    ops.append(kv[0], meta[0], table, tokens, tokens, torch.zeros(1, dtype=torch.int32))
    return kv[0], meta[0], table, torch.tensor([size + 1], dtype=torch.int32)


def score(query: Tensor, keys: Tensor, radius_scale: float = 1.0) -> float:
    scores = ops.page_scores(query.view(1, 1, -1), *one_page(keys), radius_scale)
    assert scores[0, 0, 1] == -math.inf
    return float(scores[0, 0, 0])


def test_the_worked_example(isa: str) -> None:
    keys = torch.tensor([[1.0, -2.0], [-1.0, 3.0]])
    assert score(torch.tensor([2.0, -1.0]), keys) == 4.0
    assert score(torch.tensor([1.0, 1.0]), keys) == 4.0
    assert score(torch.tensor([0.0, 0.0]), keys) == 0.0
    assert score(torch.tensor([1.0, 1.0]), keys, radius_scale=0.0) == 0.5
    assert score(torch.tensor([1.0, 1.0]), keys, radius_scale=0.5) == 2.25


@some_cases
def test_no_key_of_a_page_scores_above_the_page(isa: str, case: Case) -> None:
    pool, q = shared(case)
    pages = ops.page_scores(q, pool.kv, pool.meta, pool.table, pool.lengths, score_open=True)
    tokens = ops.token_scores(q, pool.kv, pool.table, pool.lengths, scale=1.0)
    missing = pages.shape[2] * case.page_size - tokens.shape[2]
    padded = torch.nn.functional.pad(tokens, (0, missing), value=-math.inf)
    best = padded.view(*pages.shape, case.page_size).amax(dim=-1)
    seen = best.isfinite()
    room = TOLERANCE["sum"] * tokens[tokens.isfinite()].abs().max()
    assert (pages[seen] >= best[seen] - room).all()
    assert torch.equal(pages.isfinite(), seen)
    if case.page_size == 1:
        assert torch.allclose(pages[seen], best[seen], rtol=0.0, atol=float(room))


@some_cases
def test_the_group_maximum_bounds_each_head(isa: str, case: Case) -> None:
    pool, q = shared(case)
    each = ops.page_scores(q, pool.kv, pool.meta, pool.table, pool.lengths)
    group = ops.page_scores(q, pool.kv, pool.meta, pool.table, pool.lengths, reduce="max")
    assert (group.repeat_interleave(case.group, 1) >= each).all()


def test_the_bound_is_tight_for_equal_keys_and_for_one_channel(isa: str) -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randint(-9, 9, (16, 64), generator=generator).float()
    query = torch.randint(-9, 9, (64,), generator=generator).float()
    same = keys[:1].repeat(16, 1)
    assert score(query, same) == float(same[0] @ query)
    single = torch.zeros(64)
    single[13] = -3.0
    assert score(single, keys) == float((keys @ single).max())


def test_permuting_the_keys_of_a_page_changes_nothing(isa: str) -> None:
    generator = torch.Generator().manual_seed(1)
    keys, query = torch.randn(16, 64, generator=generator), torch.randn(64, generator=generator)
    order = torch.randperm(16, generator=generator)
    assert score(query, keys) == score(query, keys[order])


def test_scores_are_homogeneous_in_the_query(isa: str) -> None:
    generator = torch.Generator().manual_seed(2)
    keys, query = torch.randn(16, 64, generator=generator), torch.randn(64, generator=generator)
    assert score(4.0 * query, keys) == 4.0 * score(query, keys)


def test_metadata_is_the_extreme_keys_exactly(isa: str) -> None:
    keys = torch.randn(16, 40, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    meta = one_page(keys)[1]
    assert torch.equal(meta[0, 0, 0], keys.amax(dim=0))
    assert torch.equal(meta[0, 0, 1], keys.amin(dim=0))


def test_a_planted_needle_is_found_with_two_pages(isa: str) -> None:
    case = Case(torch.bfloat16, 1, 16)
    generator = torch.Generator().manual_seed(4)
    keys = torch.randn(1, 1, 260, 64, generator=generator)
    query = torch.randn(1, 1, 64, generator=generator)
    keys[0, 0, 83] = 8.0 * query / query.norm() * 4.0
    kv, meta = ops.allocate_pages(1, 17, 1, case.page_size, 64, case.dtype)
    table = torch.arange(17, dtype=torch.int32).view(1, 17)
    k = keys.to(case.dtype)
    ops.append(kv[0], meta[0], table, k, k, torch.zeros(1, dtype=torch.int32))
    lengths = torch.tensor([260], dtype=torch.int32)
    scores = ops.page_scores(query.to(case.dtype), kv[0], meta[0], table, lengths)
    index, _ = ops.select_top(scores, lengths // 16 + 1, torch.tensor([2], dtype=torch.int32), True)
    assert index.tolist() == [[[83 // 16, 16]]]


@pytest.mark.parametrize("length", [16, 32])
def test_a_full_last_page_is_still_the_current_one(isa: str, length: int) -> None:
    case = Case(torch.float32, 3, 16)
    pool, q = shared(case)
    row = case.lengths.index(257)
    one = slice(row, row + 1)
    lengths = torch.tensor([length], dtype=torch.int32)
    scores = ops.page_scores(q[one], pool.kv, pool.meta, pool.table[one], lengths)
    assert scores[0, :, : length // 16 - 1].isfinite().all()
    assert (scores[0, :, length // 16 - 1 :] == -math.inf).all()
