"""Attention over a prompt: the compiled path, torch's and the column sums equal the reference."""

from __future__ import annotations

import pytest
import torch
from pools import close
from torch import Tensor

from quest_dist import ops
from quest_dist import reference_prefill as reference


def prompt(
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    queries: int,
    length: int,
    dim: int,
    rows: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """q [R, H, n, D], k, v [R, G, L, D], strided as a model's projections are."""
    generator = torch.Generator().manual_seed(queries + length)

    def projected(many: int, tokens: int) -> Tensor:
        drawn = torch.randn(rows, tokens, many, dim, generator=generator)
        return drawn.to(dtype).transpose(1, 2)

    return projected(heads, queries), projected(kv_heads, length), projected(kv_heads, length)


SHAPES = [(1, 1), (2, 2), (47, 47), (48, 48), (49, 49), (64, 64), (130, 130), (257, 257)]
CHUNKS = [(1, 100), (5, 64), (60, 200), (100, 163)]


@pytest.mark.parametrize(("queries", "length"), SHAPES + CHUNKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(3, 1, 64), (4, 2, 128), (2, 2, 32)])
def test_prefill(
    isa: str, queries: int, length: int, dtype: torch.dtype, heads: int, kv_heads: int, dim: int
) -> None:
    q, k, v = prompt(dtype, heads, kv_heads, queries, length, dim, rows=2)
    want = reference.prefill_attend(q.double(), k.double(), v.double())
    got = ops.prefill_attend(q, k, v)
    assert got.shape == (2, queries, heads, dim)
    assert got.is_contiguous()
    assert close(got, want, "prefill bf16" if dtype == torch.bfloat16 else dtype)


def test_prefill_with_large_scores_stays_finite(isa: str) -> None:
    q, k, v = prompt(torch.bfloat16, 2, 1, 150, 150, 64)
    want = reference.prefill_attend((q * 30).double(), k.double(), v.double())
    assert close(ops.prefill_attend(q * 30, k, v), want, "prefill bf16")


def test_prefill_takes_any_number_of_threads() -> None:
    q, k, v = prompt(torch.bfloat16, 3, 1, 200, 200, 64)
    ops.set_threads(1)
    one = ops.prefill_attend(q, k, v)
    ops.set_threads(3)
    three = ops.prefill_attend(q, k, v)
    ops.set_threads(None)
    assert torch.equal(one, three)


def test_prefill_of_a_row_alone_equals_the_row_in_its_batch() -> None:
    q, k, v = prompt(torch.bfloat16, 2, 1, 100, 100, 64, rows=3)
    batch = ops.prefill_attend(q, k, v)
    for r in range(3):
        one = slice(r, r + 1)
        assert torch.equal(ops.prefill_attend(q[one], k[one], v[one]), batch[one])


@pytest.mark.parametrize(("queries", "length"), [(1, 1), (130, 130), (1, 100), (60, 300)])
def test_column_sums(queries: int, length: int) -> None:
    q, k, _ = prompt(torch.float32, 4, 2, queries, length, 64)
    want = reference.column_sums(q.double(), k.double())
    got = ops.column_sums(q, k)
    assert got.dtype == torch.float32
    assert close(got, want)
    assert torch.allclose(got.sum(-1), torch.full((1, 4), float(queries)))


def test_column_sums_equal_the_summed_softmax() -> None:
    q, k, _ = prompt(torch.float64, 2, 1, 20, 30, 8)
    score = q @ k.mT * 8**-0.5
    future = torch.ones(20, 30, dtype=torch.bool).triu(11)
    want = score.masked_fill(future, -torch.inf).softmax(-1).sum(2)
    assert torch.allclose(reference.column_sums(q, k), want)
