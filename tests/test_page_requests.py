"""Requests say what lists say: a paged decode of them, in float64, is the reference's attention."""

from __future__ import annotations

import dataclasses
import math

import no_gpu
import paged_decode
import pytest
import torch
from pools import Case, Pool, close, filled_pool, name, random_lists, shared

from quest_dist import ops, reference
from quest_dist.on_flashinfer import Decode
from quest_dist.page_requests import PageRequests, page_requests

CASES = [
    Case(torch.float32, group, page_size, 8, kv_heads)
    for group in (1, 4)
    for page_size in (16, 32)
    for kv_heads in (1, 3)
]


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    """What defines FlashInfer's results stands in for it."""
    paged_decode.install(monkeypatch)


def agree(
    pool: Pool, q: torch.Tensor, index: torch.Tensor | None, count: torch.Tensor | None
) -> PageRequests:
    requests = page_requests(pool.kv, q.shape[1], pool.table, pool.lengths, index, count)
    want = reference.attend(q.double(), pool.kv.double(), pool.table, pool.lengths, index, count)
    decode = Decode(q.device, tensor_cores=False)
    decode.plan(requests, q.double(), pool.kv.double(), q.shape[2] ** -0.5)
    out, lse = decode.out_and_lse(q.double(), pool.kv.double())
    assert close(out, want.out, torch.float64)
    assert close(lse * math.log(2), want.lse, torch.float64)
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


@pytest.mark.parametrize("lists", [None, 1, 2, 8])
def test_nothing_waits_for_the_device(lists: int | None) -> None:
    case = Case(torch.bfloat16, 4, 16)
    pool, _ = shared(case)
    given = (None, None) if lists is None else random_lists(case, lists, "pages")
    here = (pool.kv, case.heads, pool.table, pool.lengths, *given)
    there = [x.to(no_gpu.DEVICE) if isinstance(x, torch.Tensor) else x for x in here]
    with no_gpu.OneDevice():
        requests = page_requests(*there)
    for got, want in zip(requests, page_requests(*here), strict=True):
        if isinstance(want, torch.Tensor):
            assert (got.shape, got.dtype) == (want.shape, want.dtype)
