"""Reference: the ops in plain torch, in any floating dtype; the contract of the compiled ones.

Written for reading: loops over rows and heads. In float64 it is what the tests judge the others by.

Shape letters: R rows, H query heads, G kv heads, g = H / G, N pages in the pool, P pages in a row's
table, S page size, D head dimension, L tokens, n new tokens, Hs lists of a selection (1, G or H).
Logical position t of row r lives in page page_table[r, t // S], slot t % S. The last page of a row
is the one that holds position length - 1; the pages before it are closed.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from quest_dist.metadata import Int8Metadata, decoded


class Attended(NamedTuple):
    """What `attend` returns; M is the largest number of tokens that a list names."""

    out: Tensor  # [R, H, D], the dtype of q
    attended: Tensor  # int32 [R, H]: tokens each query head attended to
    read: Tensor  # int32 [R, G]: tokens of the union over the kv head's query heads
    probabilities: Tensor | None  # [R, H, M] in list order, zero beyond a list's end
    lse: Tensor  # [R, H]: log sum exp of the scaled scores


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums of a dtype are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _dense(kv: Tensor, table_row: Tensor, length: int) -> Tensor:
    """Keys and values of one row, [G, 2, L, D]."""
    pages, page_size = kv.shape[0], kv.shape[3]
    ids = table_row[: (length + page_size - 1) // page_size]
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= pages):
        raise ValueError(f"page_table names a page outside the pool's 0..{pages - 1}")
    rows = kv[ids.long()].permute(1, 2, 0, 3, 4)  # [G, 2, pages, S, D]
    return rows.reshape(kv.shape[1], 2, -1, kv.shape[4])[:, :, :length]


def _check_lengths(op: str, kv: Tensor, page_table: Tensor, lengths: Tensor) -> None:
    slots = page_table.shape[1] * kv.shape[3]
    if int(lengths.min()) < 1 or int(lengths.max()) > slots:
        raise ValueError(f"{op}: lengths must lie in 1..{slots}, the slots of a row of page_table")


def append(
    kv: Tensor, meta: Tensor, page_table: Tensor, k: Tensor, v: Tensor, starts: Tensor
) -> None:
    """Write k, v [R, G, n, D] at positions starts[r] + i; when position p with p % S = S - 1 is

    written, its page closes: meta[page, :, 0] = max and meta[page, :, 1] = min over its S keys.
    """
    page_size, slots = kv.shape[3], page_table.shape[1] * kv.shape[3]
    for r, start in enumerate(starts.tolist()):
        if start < 0 or start + k.shape[2] > slots:
            raise ValueError(f"append: starts[{r}] is {start}: the tokens do not fit {slots} slots")
        for i in range(k.shape[2]):
            page, slot = divmod(start + i, page_size)
            at = int(page_table[r, page])
            if not 0 <= at < kv.shape[0]:
                raise ValueError(f"append: page_table[{r}, {page}] is {at}, outside the pool")
            kv[at, :, 0, slot] = k[r, :, i]
            kv[at, :, 1, slot] = v[r, :, i]
            if slot == page_size - 1:
                meta[at, :, 0] = kv[at, :, 0].amax(dim=1)
                meta[at, :, 1] = kv[at, :, 0].amin(dim=1)


def page_scores(
    q: Tensor,
    kv: Tensor,
    meta: Tensor | Int8Metadata,
    page_table: Tensor,
    lengths: Tensor,
    radius_scale: float = 1.0,
    reduce: str = "per_query",
    score_open: bool = False,
) -> Tensor:
    """Scores of pages, [R, Hs, P]; Hs = H for per_query, else G ('max' and 'mean' over the group).

    With M, m the page's maximum and minimum and s = radius_scale:
    u = sum_d a_d M_d + b_d m_d, a = (q + s |q|) / 2, b = (q - s |q|) / 2
      = q . c + s |q| . r, c = (M + m) / 2, r = (M - m) / 2.
    s = 1 is Quest's upper bound of q . k over the page's keys. The last page and those beyond score
    -inf, unless `score_open`, which scores the last page by the keys it holds so far.
    """
    _check_lengths("page_scores", kv, page_table, lengths)
    rows, heads, _ = q.shape
    kv_heads, page_size, exact = kv.shape[1], kv.shape[3], accumulator(q.dtype)
    scores = torch.full((rows, heads, page_table.shape[1]), -math.inf, dtype=exact)
    for r, length in enumerate(lengths.tolist()):
        last = (length - 1) // page_size
        bounds = decoded(meta, r, page_table[r, :last].long()).to(exact)  # [closed, G, 2, D]
        if score_open:
            keys = _dense(kv, page_table[r], length)[:, 0, last * page_size :].to(exact)
            tail = torch.stack((keys.amax(dim=1), keys.amin(dim=1)), dim=1)
            bounds = torch.cat((bounds, tail[None]))
        query = q[r].to(exact).view(kv_heads, -1, q.shape[2])
        spread = radius_scale * query.abs()
        a, b = (query + spread) / 2, (query - spread) / 2
        high = torch.einsum("gid,pgd->gip", a, bounds[:, :, 0])
        low = torch.einsum("gid,pgd->gip", b, bounds[:, :, 1])
        scores[r, :, : bounds.shape[0]] = (high + low).reshape(heads, -1)
    grouped = scores.view(rows, kv_heads, -1, page_table.shape[1])
    if reduce == "max":
        return grouped.amax(dim=2)
    return grouped.mean(dim=2) if reduce == "mean" else scores


def select_top(
    scores: Tensor, items: Tensor, keep: Tensor, force_last: bool
) -> tuple[Tensor, Tensor]:
    """The keep[r] best of the first items[r] scores: index [R, Hs, K] ascending, count [R, Hs].

    Order is (score, position): of equal scores the higher position wins; NaN counts as -inf. With
    `force_last`, item items[r] - 1 is kept without competing and is one of the keep[r]. Where
    keep[r] >= items[r] or keep[r] < 0, count is -1: everything. Unused slots of index are -1.
    """
    rows, lists, width = scores.shape
    wanted = [
        -1 if k < 0 or k >= n else k for n, k in zip(items.tolist(), keep.tolist(), strict=True)
    ]
    index = torch.full((rows, lists, max(0, *wanted)), -1, dtype=torch.int32)
    count = torch.tensor(wanted, dtype=torch.int32)[:, None].repeat(1, lists)
    for r, n in enumerate(items.tolist()):
        if not 0 <= n <= width:
            raise ValueError(f"select_top: items[{r}] is {n}, but scores has {width} a row")
        if force_last and wanted[r] == 0:
            raise ValueError(f"select_top: keep[{r}] is 0, but force_last keeps the last item")
        if wanted[r] < 0:
            continue
        competing = n - 1 if force_last else n
        best = wanted[r] - 1 if force_last else wanted[r]
        for h in range(lists):
            one = scores[r, h, :competing].nan_to_num(
                nan=-math.inf, posinf=math.inf, neginf=-math.inf
            )
            newest_first = one.flip(0).sort(descending=True, stable=True).indices[:best]
            chosen = (competing - 1 - newest_first).sort().values
            index[r, h, :best] = chosen.to(torch.int32)
            if force_last:
                index[r, h, best] = n - 1
    return index, count


def _listed(index: Tensor, unit: str, page_size: int, length: int, row: int) -> Tensor:
    """Logical token positions that one list names, in list order."""
    items = index.long()
    if unit == "pages":
        limit = (length - 1) // page_size + 1
        slots = torch.arange(page_size)
        positions = (items[:, None] * page_size + slots).reshape(-1)
        positions = positions[positions < length]
    else:
        limit, positions = length, items
    wrong = items[(items < 0) | (items >= limit)]
    if wrong.numel():
        raise ValueError(
            f"attend: index: {unit[:-1]} {int(wrong[0])} of row {row} is out of range "
            f"0..{limit - 1}"
        )
    if len(set(items.tolist())) != items.numel():
        raise ValueError(f"attend: index: a {unit[:-1]} of row {row} is listed twice")
    return positions


def attend(
    q: Tensor,
    kv: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    index: Tensor | None = None,
    count: Tensor | None = None,
    unit: str = "pages",
    scale: float | None = None,
    probabilities: bool = False,
    rolled_query: Tensor | None = None,
    rolled: int = 0,
) -> Attended:
    """Attention of one query a row over the tokens that its lists name, in list order.

    p = softmax(scale q . k_t), out = sum_t p_t v_t over t in the list of the query head: list
    index[r, l, :count[r, l]] with l = 0, the kv head or the query head as Hs is 1, G or H. No
    index, or count -1: all tokens, ascending. The first `rolled` tokens of a list of tokens are
    scored with `rolled_query` instead of q. Empty lists, repeated or absent tokens are errors.
    """
    _check_lengths("attend", kv, page_table, lengths)
    rows, heads, dim = q.shape
    kv_heads, page_size = kv.shape[1], kv.shape[3]
    group, exact = heads // kv_heads, accumulator(q.dtype)
    scale = dim**-0.5 if scale is None else scale
    out = torch.empty_like(q)
    lse = torch.empty(rows, heads, dtype=exact)
    read = torch.empty(rows, kv_heads, dtype=torch.int32)
    lists: list[list[Tensor]] = []
    listed = [[False] * heads for _ in range(rows)]
    for r, length in enumerate(lengths.tolist()):
        lists.append([])
        for h in range(heads):
            chosen = torch.arange(length)
            if index is not None and count is not None:
                of = {1: 0, kv_heads: h // group, heads: h}[index.shape[1]]
                n = int(count[r, of])
                if n == 0 or n < -1 or n > index.shape[2]:
                    raise ValueError(f"attend: count[{r}, {of}] is {n}; expected 1.. or -1")
                listed[r][h] = n > 0
                if n > 0:
                    chosen = _listed(index[r, of, :n], unit, page_size, length, r)
            lists[r].append(chosen)
    width = max(len(one) for row in lists for one in row)
    weights = torch.zeros(rows, heads, width, dtype=exact) if probabilities else None
    for r, length in enumerate(lengths.tolist()):
        dense = _dense(kv, page_table[r], length).to(exact)
        for h, chosen in enumerate(lists[r]):
            keys, values = dense[h // group, :, chosen]
            score = keys @ q[r, h].to(exact)
            if rolled_query is not None and listed[r][h]:
                score[:rolled] = keys[:rolled] @ rolled_query[r, h].to(exact)
            score = score * scale
            lse[r, h] = score.logsumexp(0)
            p = (score - lse[r, h]).exp()
            out[r, h] = (p @ values).to(q.dtype)
            if weights is not None:
                weights[r, h, : len(chosen)] = p
        for kv_head in range(kv_heads):
            union = torch.cat(lists[r][kv_head * group : (kv_head + 1) * group])
            read[r, kv_head] = len(set(union.tolist()))
    attended = torch.tensor([[len(one) for one in row] for row in lists], dtype=torch.int32)
    return Attended(out, attended, read, weights, lse)


def token_scores(
    q: Tensor, kv: Tensor, page_table: Tensor, lengths: Tensor, scale: float | None = None
) -> Tensor:
    """scale q . k_t of every token, [R, H, max L]; -inf beyond a row's length."""
    _check_lengths("token_scores", kv, page_table, lengths)
    rows, heads, dim = q.shape
    exact = accumulator(q.dtype)
    scale = dim**-0.5 if scale is None else scale
    scores = torch.full((rows, heads, int(lengths.max())), -math.inf, dtype=exact)
    for r, length in enumerate(lengths.tolist()):
        keys = _dense(kv, page_table[r], length)[:, 0].to(exact)  # [G, L, D]
        query = q[r].to(exact).view(kv.shape[1], -1, dim)
        scores[r, :, :length] = (query @ keys.mT).reshape(heads, length) * scale
    return scores


def gather(kv: Tensor, page_table: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The first `length` tokens of every row as contiguous k, v [R, G, length, D]."""
    dense = torch.stack([_dense(kv, row, length) for row in page_table])  # [R, G, 2, L, D]
    return dense[:, :, 0].contiguous(), dense[:, :, 1].contiguous()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding by halves: x [R, heads, D], cos, sin [R, D]; rounded once to the dtype of x.

    y = x cos + (-x2, x1) sin, where x1, x2 are the halves of x: two products and a sum.
    """
    wide = x.to(accumulator(x.dtype))
    first, second = wide.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (wide * cos[:, None] + turned * sin[:, None]).to(x.dtype)


def decode(
    q: Tensor,
    kv: Tensor,
    meta: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    keep: Tensor | None = None,
    radius_scale: float = 1.0,
    reduce: str = "max",
    scale: float | None = None,
    k: Tensor | None = None,
    v: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> Attended:
    """One token of every row, at lengths[r] - 1; no keep, or keep[r] < 0, attends to all pages."""
    _check_lengths("decode", kv, page_table, lengths)
    if cos is not None and sin is not None:
        q = rotate(q, cos, sin)
        k = None if k is None else rotate(k, cos, sin)
    if k is not None and v is not None:
        append(kv, meta, page_table, k[:, :, None], v[:, :, None], lengths - 1)
    index = count = None
    if keep is not None:
        scores = page_scores(q, kv, meta, page_table, lengths, radius_scale, reduce)
        pages = (lengths - 1) // kv.shape[3] + 1
        index, count = select_top(scores, pages, keep, force_last=True)
    return attend(q, kv, page_table, lengths, index, count, "pages", scale)
