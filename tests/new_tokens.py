"""Tokens that are about to be decoded, and decode in one call or in pieces."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from pools import Case, empty_pool, filled_pool, queries
from torch import Tensor

from quest_dist import ops, reference

#: Pages that each of a case's rows (seven at most) keeps.
KEEPS: dict[str, tuple[int, ...] | None] = {
    "none": None,
    "everything": (-1,) * 7,
    "last": (1,) * 7,
    "some": (2, 2, 2, 2, 2, 3, 5),
    "many": (1000,) * 7,
    "mixed": (-1, 1, 2, 1, -1, 1000, 3),
}


@dataclass
class Token:
    """A pool without the newest token of its rows (length 1: without any), and that token."""

    kv: Tensor
    meta: Tensor
    table: Tensor
    lengths: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    cos: Tensor
    sin: Tensor

    def copy(self) -> Token:
        return replace(self, kv=self.kv.clone(), meta=self.meta.clone())


@cache
def new_token(case: Case) -> Token:
    """The token that makes the rows as long as the case's lengths; read only."""
    pool, q = filled_pool(case), queries(case)
    rows, columns = pool.table.shape
    kv, meta, table = empty_pool(case, rows, columns)
    for r, length in enumerate(case.lengths):
        one, start = slice(r, r + 1), torch.zeros(1, dtype=torch.int32)
        before = (x[one, :, : length - 1] for x in (pool.k, pool.v))
        reference.append(kv, meta, table[one], *before, start)
    last = pool.lengths.long() - 1
    k, v = (x[torch.arange(rows), :, last] for x in (pool.k, pool.v))
    frequency = 10_000.0 ** -torch.arange(0, 1, 2 / case.head_dim)
    angle = (last[:, None] * frequency).repeat(1, 2)[:, : case.head_dim]
    return Token(kv, meta, table, pool.lengths, q, k, v, angle.cos(), angle.sin())


def decoded(token: Token, parts: str, keep: Tensor | None, **options: Any) -> ops.Attended:
    """ops.decode on the token, whose pool takes k and v if `parts` has 'append'."""
    if "append" in parts:
        options |= {"k": token.k, "v": token.v}
    if "rotate" in parts:
        options |= {"cos": token.cos, "sin": token.sin}
    place = (token.kv, token.meta, token.table, token.lengths)
    return ops.decode(token.q, *place, keep, **options)


def in_pieces(
    token: Token, parts: str, keep: Tensor | None, reduce: ops.Reduce = "max", radius: float = 1.0
) -> ops.Attended:
    """The ops that decode stands for."""
    q, k, lengths = token.q, token.k, token.lengths
    if "rotate" in parts:
        q, k = (reference.rotate(x, token.cos, token.sin) for x in (q, k))
    if "append" in parts:
        new = (k[:, :, None], token.v[:, :, None])
        ops.append(token.kv, token.meta, token.table, *new, lengths - 1)
    if keep is None:
        return ops.attend(q, token.kv, token.table, lengths)
    place = (token.kv, token.meta, token.table, lengths)
    scores = ops.page_scores(q, *place, radius, reduce)
    index, count = ops.select_top(scores, (lengths - 1) // token.kv.shape[3] + 1, keep, True)
    return ops.attend(q, token.kv, token.table, lengths, index, count)


def pages(case: Case, kind: str) -> Tensor | None:
    """Pages to keep of one of KEEPS."""
    keep = KEEPS[kind]
    return None if keep is None else torch.tensor(keep[: len(case.lengths)], dtype=torch.int32)


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0))


def assert_same(got: ops.Attended, want: ops.Attended) -> None:
    for field in ("out", "lse", "attended", "read"):
        assert torch.equal(getattr(got, field), getattr(want, field)), field
    assert got.probabilities is None
