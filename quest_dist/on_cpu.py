"""The checked ops on the CPU: results are allocated here, and quest_dist._cpu fills them.

Called by `ops` alone, with the arguments it has checked; see there for what each op means.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quest_dist.arguments import Arguments, strided
from quest_dist.backend import compiled, threads
from quest_dist.reference import Attended, rotate


def prefer_huge_pages(memory: Tensor) -> None:
    """Ask for huge pages under memory that has not been touched yet."""
    compiled().prefer_huge_pages(memory.data_ptr(), memory.nbytes)


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
    meta: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    radius_scale: float,
    kind: int,
    score_open: bool,
) -> Tensor:
    """ops.page_scores; `kind` counts in ops.REDUCTIONS."""
    native = compiled()
    scores = torch.empty(a["R"], a["G"] if kind else a["H"], a["P"])
    native.page_scores(
        a.pages(native, kv, page_table, meta),
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
        weights = torch.empty(rows, heads, width)
    result = Attended(
        out=torch.empty_like(q),
        attended=torch.empty(rows, heads, dtype=torch.int32),
        read=torch.empty(rows, a["G"], dtype=torch.int32),
        probabilities=weights,
        lse=torch.empty(rows, heads),
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
    """ops.decode; `kind` counts in ops.REDUCTIONS. Wrong values are refused before it writes."""
    slots = a["P"] * a["S"]
    _refuse(a, "lengths", lengths, (lengths < 1) | (lengths > slots), f"1..{slots}")
    if keep is not None:
        _refuse(a, "keep", keep, keep == 0, "at least the last page, or -1 for all")
    a.sizes.update(n=1, Hs=a["G"] if kind else a["H"], M=a["P"])
    if cos is not None and sin is not None:
        q = rotate(q, cos, sin)
        k = None if k is None else rotate(k, cos, sin)
    if k is not None and v is not None:
        append(a, kv, meta, page_table, k[:, :, None], v[:, :, None], lengths - 1)
    q = q.contiguous()
    index = count = None
    if keep is not None:
        scores = page_scores(a, q, kv, meta, page_table, lengths, radius_scale, kind, False)
        pages = (lengths - 1) // a["S"] + 1
        index, count = select_top(a, scores, pages, keep, True)
        a.sizes["K"] = index.shape[2]
    return attend(a, q, kv, page_table, lengths, index, count, 0, scale, False, None, 0)


def _refuse(a: Arguments, name: str, values: Tensor, wrong: Tensor, expected: str) -> None:
    for r in wrong.nonzero()[:, 0].tolist():
        raise a.refuse(f"{name}[{r}]", int(values[r]), expected)


def token_scores(
    a: Arguments, q: Tensor, kv: Tensor, page_table: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    """ops.token_scores, as wide as the longest row."""
    native = compiled()
    width = max(0, int(lengths.max())) if a["R"] else 0
    scores = torch.empty(a["R"], a["H"], width)
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
