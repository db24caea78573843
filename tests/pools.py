"""Random paged pools for the op tests, and the one place where tolerances live.

A pool's rows hold ragged lengths on shuffled physical pages; every slot, page and metadata entry
that no row filled is NaN, so whatever reads one shows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from quest_dist import ops, reference

# Largest |difference| over largest |value| against float64 on the same rounded inputs. Sums are
# fp32 everywhere; `out` is rounded once to the dtype of q; bf16 prefill rounds probabilities too.
TOLERANCE = {
    "sum": 2e-6,
    "prefill bf16": 2**-7,
    "packed bf16": 2**-9,  # scores meet queries times scales that are rounded to bf16
    "nuq bf16": 3 * 2**-9,  # levels are rounded to bf16, probabilities too, and the result
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.bfloat16: 2**-8,
    torch.float16: 2**-11,
}


def close(got: Tensor, want: Tensor, kind: str | torch.dtype = "sum") -> bool:
    """Whether infinities agree and finite values differ by no more than the tolerance of `kind`."""
    finite = want.isfinite()
    if not torch.equal(got.isfinite(), finite):
        return False
    if not torch.equal(got[~finite].to(want.dtype), want[~finite]):
        return False
    error = (got[finite].to(torch.float64) - want[finite]).abs()
    scale = want[finite].abs().max().item() if error.numel() else 1.0
    return error.numel() == 0 or error.max().item() <= TOLERANCE[kind] * max(scale, 1.0)


@dataclass(frozen=True)
class Case:
    """Shapes of one pool."""

    dtype: torch.dtype
    group: int
    page_size: int
    head_dim: int = 64
    kv_heads: int = 2

    @property
    def heads(self) -> int:
        return self.group * self.kv_heads

    @property
    def lengths(self) -> tuple[int, ...]:
        s = self.page_size
        return tuple(sorted({1, max(1, s - 1), s, s + 1, 3 * s - 1, 100, 257}))


CASES = [
    Case(dtype, group, page_size)
    for dtype in (torch.float32, torch.bfloat16)
    for group in (1, 3, 4, 8)
    for page_size in (1, 8, 16, 32)
] + [
    Case(dtype, 2, 16, head_dim)
    for dtype in (torch.float32, torch.bfloat16)
    for head_dim in (2, 40, 96, 128)
]


def name(case: Case) -> str:
    """A readable id of a case."""
    kind = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[case.dtype]
    return f"{kind}-g{case.group}-S{case.page_size}-D{case.head_dim}"


@dataclass
class Pool:
    """One layer's pages, the rows in them, and the dense tokens they were filled with."""

    kv: Tensor
    meta: Tensor
    table: Tensor
    lengths: Tensor
    k: Tensor
    v: Tensor

    def as_float64(self) -> tuple[Tensor, Tensor]:
        return self.kv.double(), self.meta.double()


def empty_pool(case: Case, rows: int, row_pages: int) -> tuple[Tensor, Tensor, Tensor]:
    """kv and meta full of NaN, and a page table of shuffled pages (some pages are no row's)."""
    pages = rows * row_pages + 3
    kv, meta = ops.allocate_pages(
        1, pages, case.kv_heads, case.page_size, case.head_dim, case.dtype
    )
    kv.fill_(math.nan)
    meta.fill_(math.nan)
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(7))
    table = order[: rows * row_pages].view(rows, row_pages).to(torch.int32)
    return kv[0], meta[0], table


def filled_pool(case: Case, seed: int = 0) -> Pool:
    """Rows of the case's lengths, appended by the reference."""
    generator = torch.Generator().manual_seed(seed)
    rows, longest = len(case.lengths), max(case.lengths)
    kv, meta, table = empty_pool(case, rows, (longest - 1) // case.page_size + 2)
    shape = (rows, case.kv_heads, longest, case.head_dim)
    k = torch.randn(shape, generator=generator).to(case.dtype)
    v = torch.randn(shape, generator=generator).to(case.dtype)
    for r, length in enumerate(case.lengths):
        one, start = slice(r, r + 1), torch.zeros(1, dtype=torch.int32)
        reference.append(kv, meta, table[one], k[one, :, :length], v[one, :, :length], start)
    return Pool(kv, meta, table, torch.tensor(case.lengths, dtype=torch.int32), k, v)


def queries(case: Case, seed: int = 1) -> Tensor:
    """One query a row, [R, H, D]."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(case.lengths), case.heads, case.head_dim)
    return torch.randn(shape, generator=generator).to(case.dtype)


@cache
def shared(case: Case) -> tuple[Pool, Tensor]:
    """A filled pool and its queries; read only, shared by the tests of one process."""
    return filled_pool(case), queries(case)


def random_lists(case: Case, lists: int, unit: str, seed: int = 2) -> tuple[Tensor, Tensor]:
    """Lists of random size and content, pages ascending, tokens shuffled; some rows take all."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for r, length in enumerate(case.lengths):
        limit = length if unit == "tokens" else (length - 1) // case.page_size + 1
        for i in range(lists):
            size = 1 + int(torch.randint(limit, (1,), generator=generator))
            chosen = torch.randperm(limit, generator=generator)[:size]
            chosen = chosen if unit == "tokens" else chosen.sort().values
            rows.append(chosen[:0] if (r + i) % 5 == 4 else chosen)
    width = max(len(one) for one in rows)
    index = torch.full((len(rows), width), -1, dtype=torch.int32)
    for to, one in zip(index, rows, strict=True):
        to[: len(one)] = one
    count = torch.tensor([len(one) or -1 for one in rows], dtype=torch.int32)
    shape = (len(case.lengths), lists)
    return index.view(*shape, width), count.view(shape)
