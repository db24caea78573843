"""What must be the same bits: splits of an append, spellings of a list, threads, batches, pages."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from pools import CASES, Case, empty_pool, filled_pool, name, queries, random_lists, shared
from torch import Tensor

from quest_dist import ops

SOME = [Case(d, 3, s) for d in (torch.float32, torch.bfloat16) for s in (1, 16)] + [CASES[-1]]
some_cases = pytest.mark.parametrize("case", SOME, ids=name)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Both settings of the pool, and back."""
    yield
    ops.set_threads(None)


def same(a: ops.Attended, b: ops.Attended) -> bool:
    pairs = [(a.out, b.out), (a.lse, b.lse), (a.attended, b.attended), (a.read, b.read)]
    return all(torch.equal(x, y) for x, y in pairs)


def ascending(lengths: tuple[int, ...], unit_size: int) -> tuple[Tensor, Tensor]:
    items = [(length - 1) // unit_size + 1 for length in lengths]
    index = torch.arange(max(items), dtype=torch.int32).repeat(len(items), 1, 1)
    for row, n in zip(index, items, strict=True):
        row[:, n:] = -1
    return index.contiguous(), torch.tensor(items, dtype=torch.int32)[:, None].contiguous()


@some_cases
@pytest.mark.parametrize("split", [1, 3, 15, 16, 17, 40])
def test_metadata_is_the_same_for_any_split_of_the_tokens(isa: str, case: Case, split: int) -> None:
    pool, _ = shared(case)
    kv, meta, table = empty_pool(case, *pool.table.shape)
    length = 100
    for start in range(0, length, split):
        some = slice(start, min(start + split, length))
        starts = torch.full((len(table),), start, dtype=torch.int32)
        # Strided as a model's projections are: [R, n, G, D] seen as [R, G, n, D].
        k, v = (
            x[:, :, some].transpose(1, 2).contiguous().transpose(1, 2) for x in (pool.k, pool.v)
        )
        ops.append(kv, meta, table, k, v, starts)
    whole = empty_pool(case, *pool.table.shape)
    start = torch.zeros(len(table), dtype=torch.int32)
    ops.append(*whole, pool.k[:, :, :length], pool.v[:, :, :length], start)
    assert torch.equal(kv.nan_to_num(9.0), whole[0].nan_to_num(9.0))
    assert torch.equal(meta.nan_to_num(9.0), whole[1].nan_to_num(9.0))


@some_cases
@pytest.mark.parametrize("lists", ["one", "kv", "query"])
@pytest.mark.parametrize("unit", ["pages", "tokens"])
def test_selecting_everything_is_selecting_nothing(
    isa: str, case: Case, lists: str, unit: ops.Unit
) -> None:
    pool, q = shared(case)
    many = {"one": 1, "kv": case.kv_heads, "query": case.heads}[lists]
    index, count = ascending(case.lengths, case.page_size if unit == "pages" else 1)
    index, count = index.repeat(1, many, 1), count.repeat(1, many)
    dense = ops.attend(q, pool.kv, pool.table, pool.lengths)
    listed = ops.attend(q, pool.kv, pool.table, pool.lengths, index, count, unit)
    assert same(dense, listed)
    marked = ops.attend(
        q, pool.kv, pool.table, pool.lengths, index, torch.full_like(count, -1), unit
    )
    assert same(dense, marked)


@some_cases
def test_lists_of_a_group_equal_the_same_list_for_each_head(isa: str, case: Case) -> None:
    pool, q = shared(case)
    index, count = random_lists(case, case.kv_heads, "pages")
    by_group = ops.attend(q, pool.kv, pool.table, pool.lengths, index, count)
    by_head = ops.attend(
        q,
        pool.kv,
        pool.table,
        pool.lengths,
        index.repeat_interleave(case.group, 1),
        count.repeat_interleave(case.group, 1),
    )
    assert same(by_group, by_head)


@some_cases
def test_pages_of_a_list_equal_their_tokens(isa: str, case: Case) -> None:
    pool, q = shared(case)
    index, count = random_lists(case, 1, "pages")
    tokens = torch.full((len(case.lengths), 1, max(case.lengths)), -1, dtype=torch.int32)
    sizes = count.clone()
    for r, length in enumerate(case.lengths):
        if count[r, 0] < 0:
            continue
        first = index[r, 0, : count[r, 0], None] * case.page_size
        positions = (first + torch.arange(case.page_size)).view(-1)
        positions = positions[positions < length]
        tokens[r, 0, : len(positions)] = positions
        sizes[r, 0] = len(positions)
    by_page = ops.attend(q, pool.kv, pool.table, pool.lengths, index, count)
    by_token = ops.attend(q, pool.kv, pool.table, pool.lengths, tokens, sizes, "tokens")
    assert same(by_page, by_token)


@some_cases
def test_any_number_of_threads(isa: str, case: Case, two_threads: None) -> None:
    pool, q = shared(case)
    index, count = random_lists(case, case.heads, "pages")
    outcomes = []
    for threads in (1, 2, 5):
        ops.set_threads(threads)
        assert ops.threads() == threads
        scores = ops.page_scores(q, pool.kv, pool.meta, pool.table, pool.lengths)
        attended = ops.attend(q, pool.kv, pool.table, pool.lengths, index, count)
        outcomes.append((scores, attended))
    for scores, attended in outcomes[1:]:
        assert torch.equal(scores, outcomes[0][0])
        assert same(attended, outcomes[0][1])


@some_cases
def test_a_row_alone_equals_the_row_in_its_batch(isa: str, case: Case) -> None:
    pool, q = shared(case)
    index, count = random_lists(case, case.heads, "pages")
    batch = ops.attend(q, pool.kv, pool.table, pool.lengths, index, count)
    scores = ops.page_scores(q, pool.kv, pool.meta, pool.table, pool.lengths)
    for r in range(len(case.lengths)):
        one = slice(r, r + 1)
        row = (pool.table[one], pool.lengths[one])
        alone = ops.attend(q[one], pool.kv, *row, index[one], count[one])
        assert same(alone, ops.Attended(*(None if x is None else x[one] for x in batch)))
        assert torch.equal(scores[one], ops.page_scores(q[one], pool.kv, pool.meta, *row))


@some_cases
def test_physical_pages_do_not_matter(isa: str, case: Case) -> None:
    pool, q = filled_pool(case), queries(case)
    order = torch.randperm(len(pool.kv), generator=torch.Generator().manual_seed(3))
    table = order.argsort()[pool.table.long()].to(torch.int32)
    index, count = random_lists(case, case.kv_heads, "pages")
    before = ops.attend(q, pool.kv, pool.table, pool.lengths, index, count)
    after = ops.attend(q, pool.kv[order], table, pool.lengths, index, count)
    assert same(before, after)
    scores = ops.page_scores(q, pool.kv, pool.meta, pool.table, pool.lengths)
    moved = ops.page_scores(q, pool.kv[order], pool.meta[order], table, pool.lengths)
    assert torch.equal(scores, moved)


@some_cases
def test_one_query_head_a_kv_head_makes_the_reductions_equal(isa: str, case: Case) -> None:
    alone = Case(case.dtype, 1, case.page_size, case.head_dim)
    pool, q = shared(alone)
    kinds: list[ops.Reduce] = ["per_query", "max", "mean"]
    scores = [
        ops.page_scores(q, pool.kv, pool.meta, pool.table, pool.lengths, reduce=kind)
        for kind in kinds
    ]
    assert torch.equal(scores[0], scores[1])
    assert torch.equal(scores[0], scores[2])
