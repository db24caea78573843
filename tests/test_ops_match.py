"""Each op on each instruction set equals the reference in float64 on the same rounded inputs."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from pools import CASES, Case, close, empty_pool, name, random_lists, shared

from quest_dist import ops, reference

every_case = pytest.mark.parametrize("case", CASES, ids=name)


@cache
def expected_attention(case: Case, lists: int, unit: str) -> reference.Attended:
    pool, q = shared(case)
    index, count = random_lists(case, lists, unit) if lists else (None, None)
    kv, _ = pool.as_float64()
    arguments: dict[str, Any] = {"index": index, "count": count, "unit": unit}
    return reference.attend(
        q.double(), kv, pool.table, pool.lengths, probabilities=True, **arguments
    )


@cache
def expected_scores(case: Case, reduce: str, score_open: bool) -> torch.Tensor:
    pool, q = shared(case)
    kv, meta = pool.as_float64()
    return reference.page_scores(
        q.double(), kv, meta, pool.table, pool.lengths, 0.7, reduce, score_open
    )


@every_case
def test_append_writes_what_the_reference_writes(isa: str, case: Case) -> None:
    pool, _ = shared(case)
    kv, meta, table = empty_pool(case, *pool.table.shape)
    for r, length in enumerate(case.lengths):
        one = slice(r, r + 1)
        k, v = pool.k[one, :, :length], pool.v[one, :, :length]
        ops.append(kv, meta, table[one], k, v, torch.zeros(1, dtype=torch.int32))
    assert torch.equal(kv.nan_to_num(9.0), pool.kv.nan_to_num(9.0))
    assert torch.equal(meta.nan_to_num(9.0), pool.meta.nan_to_num(9.0))


@every_case
def test_page_scores(isa: str, case: Case) -> None:
    pool, q = shared(case)
    place = (pool.kv, pool.meta, pool.table, pool.lengths)
    for reduce in ops.REDUCTIONS:
        for score_open in (False, True):
            got = ops.page_scores(q, *place, 0.7, reduce, score_open)
            assert close(got, expected_scores(case, reduce, score_open)), (reduce, score_open)


@every_case
@pytest.mark.parametrize(
    ("lists", "unit"),
    [
        ("none", "pages"),
        ("one", "pages"),
        ("kv", "pages"),
        ("query", "pages"),
        ("one", "tokens"),
        ("kv", "tokens"),
        ("query", "tokens"),
    ],
)
def test_attend(isa: str, case: Case, lists: str, unit: Any) -> None:
    pool, q = shared(case)
    many = {"none": 0, "one": 1, "kv": case.kv_heads, "query": case.heads}[lists]
    index, count = random_lists(case, many, unit) if many else (None, None)
    got = ops.attend(q, pool.kv, pool.table, pool.lengths, index, count, unit, probabilities=True)
    want = expected_attention(case, many, unit)
    assert torch.equal(got.attended, want.attended)
    assert torch.equal(got.read, want.read)
    assert close(got.lse, want.lse)
    assert got.probabilities is not None
    assert want.probabilities is not None
    assert close(got.probabilities, want.probabilities)
    assert close(got.out, want.out, case.dtype)


@every_case
def test_token_scores(isa: str, case: Case) -> None:
    pool, q = shared(case)
    kv, _ = pool.as_float64()
    want = reference.token_scores(q.double(), kv, pool.table, pool.lengths)
    assert close(ops.token_scores(q, pool.kv, pool.table, pool.lengths), want)


@every_case
def test_gather_gives_back_what_was_appended(device: str, case: Case) -> None:
    pool, _ = shared(case)
    for r, length in enumerate(case.lengths):
        k, v = ops.gather(pool.kv, pool.table[r : r + 1], length)
        assert torch.equal(k[0], pool.k[r, :, :length])
        assert torch.equal(v[0], pool.v[r, :, :length])


@pytest.mark.parametrize("case", CASES[-3:], ids=name)
def test_the_first_rolled_tokens_see_the_rolled_query(isa: str, case: Case) -> None:
    pool, q = shared(case)
    other = q.flip(0).contiguous()
    index, count = random_lists(case, case.heads, "tokens")
    kv, _ = pool.as_float64()
    arguments: dict[str, Any] = {"index": index, "count": count, "unit": "tokens", "rolled": 3}
    got = ops.attend(q, pool.kv, pool.table, pool.lengths, rolled_query=other, **arguments)
    want = reference.attend(
        q.double(), kv, pool.table, pool.lengths, rolled_query=other.double(), **arguments
    )
    plain = ops.attend(q, pool.kv, pool.table, pool.lengths, index, count, "tokens")
    assert close(got.out, want.out, case.dtype)
    assert not close(got.out, plain.out.double(), case.dtype)


def test_the_reference_backend_runs_in_float64() -> None:
    pool, q = shared(CASES[0])
    kv, meta = pool.as_float64()
    with ops.backend("reference"):
        scores = ops.page_scores(q.double(), kv, meta, pool.table, pool.lengths)
        attended = ops.attend(q.double(), kv, pool.table, pool.lengths)
    assert scores.dtype == attended.out.dtype == torch.float64
    got = ops.attend(q, pool.kv, pool.table, pool.lengths)
    assert close(got.out, attended.out, CASES[0].dtype)
