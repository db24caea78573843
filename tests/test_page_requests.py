"""Requests say what lists say: FlashInfer's contract, read in plain torch, is attention."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from pools import Case, Pool, close, filled_pool, name, random_lists, shared

from quest_dist import ops, reference
from quest_dist.page_requests import PageRequests, page_requests, request_pages

CASES = [
    Case(torch.float32, group, page_size, 8, kv_heads)
    for group in (1, 4)
    for page_size in (16, 32)
    for kv_heads in (1, 3)
]


def interpreted(
    requests: PageRequests, q: torch.Tensor, kv: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in float64 as a paged decode that takes CSR defines it, and its log sum exp."""
    keys, values = request_pages(kv.double(), requests.kv_heads)
    assert keys.stride() == values.stride()
    size, dim = keys.shape[2:]
    outs, sums = [], []
    bounds = requests.indptr.tolist()
    each = q.double().reshape(-1, requests.heads, dim)
    assert len(each) == len(bounds) - 1
    for b, (start, end) in enumerate(itertools.pairwise(bounds)):
        pages = requests.indices[start:end].long()
        last = int(requests.last_page_len[b])
        assert 1 <= last <= size
        held = (len(pages) - 1) * size + last
        k, v = (
            x[pages].transpose(0, 1).reshape(requests.kv_heads, -1, dim)[:, :held]
            for x in (keys, values)
        )
        of = torch.arange(requests.heads) // requests.group
        scores = (k[of] @ each[b][:, :, None])[:, :, 0] * dim**-0.5
        outs.append((scores.softmax(-1)[:, None] @ v[of])[:, 0])
        sums.append(scores.logsumexp(-1))
    return torch.stack(outs).view(q.shape), torch.stack(sums).view(q.shape[:2])


def agree(
    pool: Pool, q: torch.Tensor, index: torch.Tensor | None, count: torch.Tensor | None
) -> PageRequests:
    requests = page_requests(pool.kv, q.shape[1], pool.table, pool.lengths, index, count)
    want = reference.attend(q.double(), pool.kv.double(), pool.table, pool.lengths, index, count)
    out, lse = interpreted(requests, q, pool.kv)
    assert close(out, want.out, torch.float64)
    assert close(lse, want.lse, torch.float64)
    assert torch.equal(requests.attended, want.attended)
    assert torch.equal(requests.read, want.read)
    return requests


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{name(c)}-G{c.kv_heads}")
@pytest.mark.parametrize("each", ["row", "kv head", "query head"])
def test_lists_of_ragged_rows(case: Case, each: str) -> None:
    pool, q = shared(case)
    lists = {"row": 1, "kv head": case.kv_heads, "query head": case.heads}[each]
    index, count = random_lists(case, lists, "pages")
    assert (count < 0).any()
    requests = agree(pool, q, index, count)
    assert requests.kv_heads == (case.kv_heads if lists == 1 else 1)
    assert requests.heads == case.heads // lists


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{name(c)}-G{c.kv_heads}")
def test_everything_is_one_request_a_row(case: Case) -> None:
    pool, q = shared(case)
    requests = agree(pool, q, None, None)
    held = requests.indptr.diff() - 1
    assert torch.equal(held * case.page_size + requests.last_page_len, pool.lengths)


@pytest.mark.parametrize("lists", [1, 2, 6])
def test_the_open_page_goes_last_and_the_others_keep_their_order(lists: int) -> None:
    case = Case(torch.float32, 3, 16, 8)
    pool, q = shared(case)
    row = case.lengths.index(257)
    one = dataclasses.replace(pool, table=pool.table[[row]], lengths=pool.lengths[[row]])
    listed = torch.tensor([9, 16, 2, 11], dtype=torch.int32)
    for place in range(4):
        index = listed.roll(place).repeat(1, lists, 1)
        count = torch.full((1, lists), 4, dtype=torch.int32)
        requests = agree(one, q[[row]], index, count)
        assert requests.last_page_len.tolist() == [1] * lists
        others = [page for page in index[0, 0].tolist() if page != 16]
        pages = pool.table[row, [*others, 16]]
        per_head = 1 if lists == 1 else case.kv_heads
        assert torch.equal(requests.indices[:4], pages * per_head)


def test_a_list_without_the_open_page_ends_with_a_full_one() -> None:
    case = Case(torch.float32, 2, 16, 8)
    pool, q = shared(case)
    rows = [r for r, length in enumerate(case.lengths) if length > 33]
    some = dataclasses.replace(pool, table=pool.table[rows], lengths=pool.lengths[rows])
    index = torch.tensor([1, 0], dtype=torch.int32).repeat(len(rows), 2, 1)
    requests = agree(some, q[rows], index, torch.full((len(rows), 2), 2, dtype=torch.int32))
    assert set(requests.last_page_len.tolist()) == {16}


def test_what_is_out_of_range_counts_as_absent() -> None:
    case = Case(torch.float32, 2, 16, 8)
    pool = filled_pool(case)
    row = case.lengths.index(100)
    kv, table, length = pool.kv, pool.table[[row]].clone(), pool.lengths[[row]]
    index = torch.tensor([[[0, 5, 99, 6, -7, 7]]], dtype=torch.int32)
    count = torch.tensor([[6]], dtype=torch.int32)
    table[0, 5] = kv.shape[0]
    requests = page_requests(kv, case.heads, table, length, index, count)
    assert requests.indptr.tolist() == [0, 2]
    assert torch.equal(requests.indices[:2], table[0, [0, 6]])
    assert requests.attended.unique().tolist() == requests.read.unique().tolist() == [20]
    for wrong in (0, -3, 10**6):
        none = page_requests(kv, case.heads, table, length * 0 + wrong)
        assert none.indptr.tolist() == [0, 0]
        assert none.last_page_len.tolist() == [0]
        assert none.attended.unique().tolist() == none.read.unique().tolist() == [0]


def test_lists_as_select_top_gives_them() -> None:
    case = Case(torch.bfloat16, 4, 16)
    pool, q = shared(case)
    scores = ops.page_scores(q, pool.kv, pool.meta, pool.table, pool.lengths, reduce="max")
    keep = torch.full_like(pool.lengths, 3)
    index, count = ops.select_top(scores, (pool.lengths - 1) // 16 + 1, keep, force_last=True)
    requests = agree(pool, q, index, count)
    assert requests.indptr.dtype == requests.indices.dtype == torch.int32
    ours = ops.attend(q, pool.kv, pool.table, pool.lengths, index, count)
    assert torch.equal(requests.read, ours.read)
