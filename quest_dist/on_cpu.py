"""The checked ops on the CPU: results are allocated here, and quest_dist._cpu fills them.

Called by `ops` alone, with the arguments it has checked; see there for what each op means.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quest_dist.arguments import Arguments, one_token, strided
from quest_dist.backend import compiled, threads
from quest_dist.metadata import Int8Metadata
from quest_dist.packing import Packed
from quest_dist.reference import Attended


def prefer_huge_pages(memory: Tensor) -> None:
    """Ask for huge pages under memory that has not been touched yet."""
    compiled().prefer_huge_pages(memory.data_ptr(), memory.nbytes)


def attended(a: Arguments, dtype: torch.dtype) -> Attended:
    """Room for what queries of `dtype` attend to, without probabilities."""
    rows, heads = a["R"], a["H"]
    return Attended(
        out=torch.empty(rows, heads, a["D"], dtype=dtype),
        attended=torch.empty(rows, heads, dtype=torch.int32),
        read=torch.empty(rows, a["G"], dtype=torch.int32),
        probabilities=None,
        lse=torch.empty(rows, heads, dtype=torch.float32),
    )


def append(
    a: Arguments, kv: Tensor, meta: Tensor, page_table: Tensor, k: Tensor, v: Tensor, starts: Tensor
) -> None:
    """ops.append."""
    native = compiled()
    pages = a.pages(native, kv, page_table, meta)
    from_k, from_v = strided(native, k), strided(native, v)
    native.append(pages, from_k, from_v, starts.data_ptr(), a["n"], threads())


def page_scores(
    a: Arguments,
    q: Tensor,
    kv: Tensor,
    meta: Tensor | Int8Metadata,
    page_table: Tensor,
    lengths: Tensor,
    radius_scale: float,
    kind: int,
    score_open: bool,
) -> Tensor:
    """ops.page_scores; `kind` counts in ops.REDUCTIONS."""
    native = compiled()
    scores = torch.empty(a["R"], a["G"] if kind else a["H"], a["P"], dtype=torch.float32)
    if isinstance(meta, Int8Metadata):
        pages = a.pages(native, kv, page_table)
        codes = native.ByteMeta(*(one.data_ptr() for one in meta))
    else:
        pages, codes = a.pages(native, kv, page_table, meta), native.ByteMeta(0, 0, 0)
    native.page_scores(
        pages,
        codes,
        q.data_ptr(),
        a["H"],
        lengths.data_ptr(),
        radius_scale,
        kind,
        score_open,
        scores.data_ptr(),
        threads(),
    )
    return scores


def select_top(
    a: Arguments, scores: Tensor, items: Tensor, keep: Tensor, force_last: bool
) -> tuple[Tensor, Tensor]:
    """ops.select_top, as wide as its longest list."""
    width = max(0, int(keep.masked_fill(keep >= items, 0).max())) if a["R"] else 0
    index = torch.empty(a["R"], a["Hs"], width, dtype=torch.int32)
    count = torch.empty(a["R"], a["Hs"], dtype=torch.int32)
    compiled().select_top(
        scores.data_ptr(),
        items.data_ptr(),
        keep.data_ptr(),
        a["R"],
        a["Hs"],
        a["M"],
        force_last,
        index.data_ptr(),
        width,
        count.data_ptr(),
        threads(),
    )
    return index, count


def attend(
    a: Arguments,
    q: Tensor,
    kv: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    index: Tensor | None,
    count: Tensor | None,
    kind: int,
    scale: float,
    probabilities: bool,
    rolled_query: Tensor | None,
    rolled: int,
) -> Attended:
    """ops.attend; `kind` counts in ops.UNITS. Probabilities are as wide as the longest list."""
    native, rows, heads = compiled(), a["R"], a["H"]
    pages = a.pages(native, kv, page_table)
    selection = a.selection(native, index, count, kind)
    width, weights = 0, None
    if probabilities:
        width = native.listed_tokens(pages, lengths.data_ptr(), selection)
        weights = torch.empty(rows, heads, width, dtype=torch.float32)
    result = Attended(
        out=torch.empty_like(q),
        attended=torch.empty(rows, heads, dtype=torch.int32),
        read=torch.empty(rows, a["G"], dtype=torch.int32),
        probabilities=weights,
        lse=torch.empty(rows, heads, dtype=torch.float32),
    )
    native.attend(
        pages,
        q.data_ptr(),
        0 if rolled_query is None else rolled_query.data_ptr(),
        rolled,
        heads,
        lengths.data_ptr(),
        selection,
        scale,
        result.out.data_ptr(),
        result.attended.data_ptr(),
        result.read.data_ptr(),
        result.lse.data_ptr(),
        0 if weights is None else weights.data_ptr(),
        width,
        threads(),
    )
    return result


def decode(
    a: Arguments,
    q: Tensor,
    kv: Tensor,
    meta: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    keep: Tensor | None,
    radius_scale: float,
    kind: int,
    scale: float,
    k: Tensor | None,
    v: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
) -> Attended:
    """ops.decode; `kind` counts in ops.REDUCTIONS."""
    native, result = compiled(), attended(a, q.dtype)
    native.decode(
        a.pages(native, kv, page_table, meta),
        *one_token(native, q, k, v, cos, sin),
        a["H"],
        lengths.data_ptr(),
        0 if keep is None else keep.data_ptr(),
        radius_scale,
        kind,
        scale,
        result.out.data_ptr(),
        result.attended.data_ptr(),
        result.read.data_ptr(),
        result.lse.data_ptr(),
        threads(),
    )
    return result


def pack(
    a: Arguments, packed: Packed, kv: Tensor, page_table: Tensor, keys: Tensor, values: Tensor
) -> None:
    """ops.pack."""
    native = compiled()
    pages, held = a.pages(native, kv, page_table), a.packed(native, packed)
    native.pack(pages, held, keys.data_ptr(), values.data_ptr(), threads())


def attend_packed(
    a: Arguments,
    q: Tensor,
    kv: Tensor,
    packed: Packed,
    page_table: Tensor,
    lengths: Tensor,
    index: Tensor | None,
    count: Tensor | None,
    kind: int,
    scale: float,
) -> Attended:
    """ops.attend_packed; `kind` counts in ops.UNITS."""
    native, rows, heads = compiled(), a["R"], a["H"]
    result = Attended(
        out=torch.empty_like(q),
        attended=torch.empty(rows, heads, dtype=torch.int32),
        read=torch.empty(rows, a["G"], dtype=torch.int32),
        probabilities=None,
        lse=torch.empty(rows, heads, dtype=torch.float32),
    )
    native.attend_packed(
        a.pages(native, kv, page_table),
        a.packed(native, packed),
        q.data_ptr(),
        heads,
        lengths.data_ptr(),
        a.selection(native, index, count, kind),
        scale,
        result.out.data_ptr(),
        result.attended.data_ptr(),
        result.read.data_ptr(),
        result.lse.data_ptr(),
        threads(),
    )
    return result


def token_scores(
    a: Arguments, q: Tensor, kv: Tensor, page_table: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    """ops.token_scores, as wide as the longest row."""
    native = compiled()
    width = max(0, int(lengths.max())) if a["R"] else 0
    scores = torch.empty(a["R"], a["H"], width, dtype=torch.float32)
    native.token_scores(
        a.pages(native, kv, page_table),
        q.data_ptr(),
        a["H"],
        lengths.data_ptr(),
        scale,
        scores.data_ptr(),
        width,
        threads(),
    )
    return scores


def gather(a: Arguments, kv: Tensor, page_table: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """ops.gather."""
    native = compiled()
    k = torch.empty(a["R"], a["G"], length, a["D"], dtype=kv.dtype)
    v = torch.empty_like(k)
    pages = a.pages(native, kv, page_table)
    native.gather(pages, length, k.data_ptr(), v.data_ptr(), threads())
    return k, v
