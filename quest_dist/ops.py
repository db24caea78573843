"""Ops: the compiled kernels of attention over pages; arguments are checked here, once.

Pages live in tensors that `allocate_pages` makes; their physical layout belongs to the backend, so
callers index kv[layer] and meta[layer] and never look inside. What each op computes, equation by
equation, stands in `reference.py`, which also runs here under `with backend('reference')`.

Where the tensors are decides what runs: `on_cpu` (fp32, bf16) or `on_cuda` (fp16 too; D a multiple
of 8), which never waits for the device, so that a CUDA graph can hold any op.

Invariants: a row's result is the same bits in every run, for any number of threads and whatever
other rows are in the call; selecting all tokens gives the bits of not selecting. Scores, softmax
and sums are fp32 and `out` is rounded once to the dtype of q. (A CPU that multiplies bf16 in pairs
rounds the weights of bf16 values to bf16 too; what these are divided by is not rounded.)

Shape letters: R rows, H query heads, G kv heads, N pages of the pool, P pages in a row's table, S
page size, D head dimension, L tokens, n new tokens, Hs lists of a selection (1, G or H).
Errors: ValueError naming the op, the argument and what was expected; on a GPU, for what depends on
values, only with QUEST_DEBUG=1 (see `faults`): an index out of range then counts as absent.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from quest_dist import on_cpu, on_cuda, on_flashinfer, reference
from quest_dist.arguments import Arguments
from quest_dist.backend import (
    backend,
    by_reference,
    isa,
    isas,
    set_isa,
    set_threads,
    threads,
)
from quest_dist.metadata import Int8Metadata
from quest_dist.packed import allocate_blocks, attend_packed, pack
from quest_dist.prefill import column_sums, prefill_attend
from quest_dist.reference import Attended

__all__ = [
    "REDUCTIONS",
    "THROUGH",
    "UNITS",
    "Attended",
    "Int8Metadata",
    "Reduce",
    "Through",
    "Unit",
    "allocate_blocks",
    "allocate_pages",
    "append",
    "attend",
    "attend_packed",
    "backend",
    "column_sums",
    "decode",
    "gather",
    "isa",
    "isas",
    "pack",
    "page_scores",
    "prefill_attend",
    "select_top",
    "set_isa",
    "set_threads",
    "threads",
    "token_scores",
]

Unit = Literal["pages", "tokens"]
Reduce = Literal["per_query", "max", "mean"]
Through = Literal["compiled", "flashinfer"]
UNITS: tuple[Unit, ...] = ("pages", "tokens")
REDUCTIONS: tuple[Reduce, ...] = ("per_query", "max", "mean")
THROUGH: tuple[Through, ...] = ("compiled", "flashinfer")


def allocate_pages(
    layers: int,
    pages: int,
    kv_heads: int,
    page_size: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """A pool of zeroed pages, kv and meta; kv[layer] and meta[layer] are what the ops take."""
    sizes = {"layers": layers, "pages": pages, "kv_heads": kv_heads, "page_size": page_size}
    for name, size in {**sizes, "head_dim": head_dim}.items():
        if size < 1:
            raise ValueError(f"allocate_pages: {name} is {size}; expected at least 1")
    shape = (layers, pages, kv_heads, 2)
    kv = torch.empty(*shape, page_size, head_dim, dtype=dtype, device=device)
    meta = torch.empty(*shape, head_dim, dtype=dtype, device=device)
    for memory in (kv, meta):
        if not by_reference() and memory.device.type == "cpu":
            on_cpu.prefer_huge_pages(memory)
        memory.zero_()
    return kv, meta


def append(
    kv: Tensor, meta: Tensor, page_table: Tensor, k: Tensor, v: Tensor, starts: Tensor
) -> None:
    """Write k, v [R, G, n, D] (rotated keys) at logical positions starts[r] + i of one layer.

    A page that fills gets its metadata, from all its keys, in `meta` [N, G, 2, D].
    """
    a = Arguments("append")
    a.take_pool(kv, page_table, starts, "starts")
    a.floats("meta", meta, "N G 2 D")
    a.floats("k", k, "R G n D", contiguous=False)
    a.floats("v", v, "R G n D", contiguous=False)
    if by_reference():
        return reference.append(kv, meta, page_table, k, v, starts)
    run = on_cuda.append if kv.is_cuda else on_cpu.append
    return run(a, kv, meta, page_table, k, v, starts)


def page_scores(
    q: Tensor,
    kv: Tensor,
    meta: Tensor | Int8Metadata,
    page_table: Tensor,
    lengths: Tensor,
    radius_scale: float = 1.0,
    reduce: Reduce = "per_query",
    score_open: bool = False,
) -> Tensor:
    """Quest's page scores, fp32 [R, Hs, P]: an upper bound of q.k in the page at radius_scale 1.

    The last page of a row (which holds position lengths - 1) and those beyond score -inf;
    `score_open` scores the last page too, by the keys it holds. On a CPU, `meta` may be in int8.
    """
    a = Arguments("page_scores")
    a.take_pool(kv, page_table, lengths)
    a.metadata(meta)
    q = a.floats("q", q, "R H D", contiguous=False).contiguous()
    a.multiple("H", "G", "query heads share kv heads evenly")
    kind = a.choice("reduce", reduce, REDUCTIONS)
    if by_reference():
        return reference.page_scores(
            q, kv, meta, page_table, lengths, radius_scale, reduce, score_open
        )
    run = on_cuda.page_scores if kv.is_cuda else on_cpu.page_scores
    return run(a, q, kv, meta, page_table, lengths, radius_scale, kind, score_open)


def select_top(
    scores: Tensor, items: Tensor, keep: Tensor, force_last: bool
) -> tuple[Tensor, Tensor]:
    """The keep[r] best of the first items[r] of scores fp32 [R, Hs, M].

    Gives index int32 [R, Hs, K], ascending, -1 where unused, and count int32 [R, Hs], -1 meaning
    everything (keep >= items or keep < 0). Ties go to the higher position; NaN counts as -inf.
    `force_last` keeps item items - 1 without competition, as one of the keep[r]. K is the length
    of the longest list; on a GPU, which does not look at keep for it, M.
    """
    a = Arguments("select_top")
    a.of_dtype("items", items, "R")
    a.of_dtype("keep", keep, "R")
    if by_reference():
        a.floats("scores", scores, "R Hs M")
        return reference.select_top(scores, items, keep, force_last)
    a.of_dtype("scores", scores, "R Hs M", torch.float32)
    run = on_cuda.select_top if scores.is_cuda else on_cpu.select_top
    return run(a, scores, items, keep, force_last)


def attend(
    q: Tensor,
    kv: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    index: Tensor | None = None,
    count: Tensor | None = None,
    unit: Unit = "pages",
    scale: float | None = None,
    probabilities: bool = False,
    rolled_query: Tensor | None = None,
    rolled: int = 0,
    through: Through = "compiled",
) -> Attended:
    """Attention of one query a row, q [R, H, D], over the pages or tokens that its lists name.

    index int32 [R, Hs, K] and count int32 [R, Hs] as `select_top` gives them; Hs is 1, G or H; no
    index, or count -1, means every token. Lists may be in any order but must not name a thing twice
    or be empty. `scale` defaults to D ** -0.5. The first `rolled` tokens of each list of tokens are
    scored with `rolled_query` [R, H, D] in place of q. `through` flashinfer (see `on_flashinfer`)
    attends to lists of pages on a GPU with that library's kernels, which round as they do.
    """
    a = Arguments("attend")
    a.take_pool(kv, page_table, lengths)
    q = a.floats("q", q, "R H D", contiguous=False).contiguous()
    a.multiple("H", "G", "query heads share kv heads evenly")
    kind = a.choice("unit", unit, UNITS)
    a.lists(index, count)
    if (rolled_query is None) != (rolled == 0) or rolled < 0:
        raise a.refuse(
            "rolled", str(rolled), "a positive number exactly when rolled_query is given"
        )
    if rolled_query is not None:
        rolled_query = a.floats(
            "rolled_query", rolled_query, "R H D", contiguous=False
        ).contiguous()
        if index is not None and unit != "tokens":
            raise a.refuse("unit", repr(unit), "'tokens' when a rolled_query is given")
    scale = a["D"] ** -0.5 if scale is None else scale
    if a.choice("through", through, THROUGH):
        return on_flashinfer.attend(
            a, q, kv, page_table, lengths, index, count, scale, probabilities
        )
    if by_reference():
        options = (unit, scale, probabilities, rolled_query, rolled)
        return reference.attend(q, kv, page_table, lengths, index, count, *options)
    run = on_cuda.attend if kv.is_cuda else on_cpu.attend
    choice = (index, count, kind, scale, probabilities, rolled_query, rolled)
    return run(a, q, kv, page_table, lengths, *choice)


def decode(
    q: Tensor,
    kv: Tensor,
    meta: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    keep: Tensor | None = None,
    *,
    radius_scale: float = 1.0,
    reduce: Reduce = "max",
    scale: float | None = None,
    k: Tensor | None = None,
    v: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> Attended:
    """One token of every row through one layer: the bits of the ops it stands for, in one call.

    With cos, sin [R, D] (fp32 or as q), q [R, H, D] and k are rotated by halves, as
    `reference.rotate` does. k, v [R, G, D] are appended at lengths[r] - 1: lengths count the token.
    keep int32 [R]: that many pages are attended to, the last one and the best by `page_scores`; all
    pages where keep < 0, or without it.
    """
    token = (k, v, cos, sin)
    a, kind, scale = decode_arguments(
        q, kv, meta, page_table, lengths, keep, radius_scale, reduce, scale, *token
    )
    if by_reference():
        place = (q, kv, meta, page_table, lengths)
        return reference.decode(*place, keep, radius_scale, reduce, scale, *token)
    run = on_cuda.decode if kv.is_cuda else on_cpu.decode
    return run(a, q, kv, meta, page_table, lengths, keep, radius_scale, kind, scale, *token)


def decode_arguments(
    q: Tensor,
    kv: Tensor,
    meta: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    keep: Tensor | None,
    radius_scale: float,
    reduce: Reduce,
    scale: float | None,
    k: Tensor | None = None,
    v: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> tuple[Arguments, int, float]:
    """What `decode` is asked, checked: its arguments, the place of `reduce`, and the scale."""
    a = Arguments("decode")
    a.take_pool(kv, page_table, lengths)
    a.floats("meta", meta, "N G 2 D")
    a.floats("q", q, "R H D", contiguous=False)
    a.multiple("H", "G", "query heads share kv heads evenly")
    kind = a.choice("reduce", reduce, REDUCTIONS)
    if keep is not None:
        a.of_dtype("keep", keep, "R")
    a.together(k=k, v=v)
    a.together(cos=cos, sin=sin)
    for name, new in (("k", k), ("v", v)):
        if new is not None:
            a.floats(name, new, "R G D", contiguous=False)
    if cos is not None:
        a.angles(cos, sin)
    return a, kind, a["D"] ** -0.5 if scale is None else scale


def token_scores(
    q: Tensor, kv: Tensor, page_table: Tensor, lengths: Tensor, scale: float | None = None
) -> Tensor:
    """scale q.k of every token: fp32 [R, H, longest length; on a GPU P * S], -inf beyond a row."""
    a = Arguments("token_scores")
    a.take_pool(kv, page_table, lengths)
    q = a.floats("q", q, "R H D", contiguous=False).contiguous()
    a.multiple("H", "G", "query heads share kv heads evenly")
    scale = a["D"] ** -0.5 if scale is None else scale
    if by_reference():
        return reference.token_scores(q, kv, page_table, lengths, scale)
    run = on_cuda.token_scores if kv.is_cuda else on_cpu.token_scores
    return run(a, q, kv, page_table, lengths, scale)


def gather(kv: Tensor, page_table: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The first `length` tokens of every row, dense: k, v [R, G, length, D]."""
    a = Arguments("gather")
    a.take_pool(kv, page_table, None)
    if not 0 <= length <= a["P"] * a["S"]:
        raise a.refuse("length", str(length), f"0..{a['P'] * a['S']}, the slots of a row")
    if by_reference():
        return reference.gather(kv, page_table, length)
    run = on_cuda.gather if kv.is_cuda else on_cpu.gather
    return run(a, kv, page_table, length)
