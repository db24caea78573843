"""Page requests: a selection of pages in the form that FlashInfer's paged decode takes, CSR.

A *request* is one list of pages and the query heads that attend to it: R * Hs of them, in the order
of `index`. Its pages are indices[indptr[b] : indptr[b + 1]], all full but the last of them, which
holds last_page_len[b] tokens. A list shared by all heads names pages of [N, G, S, D]; one of a kv
head, or of a query head, names pages of [N * G, 1, S, D], where page * G + kv head is that head's
own: so no kernel need know of lists a head.

A list may name its row's open page (which holds position lengths - 1) anywhere; a request has it
last, the others keep their order. What lies out of range (a position in a list, a page of the
pool, a length) counts as absent. Nothing here waits for the device; sizes follow from shapes.

Shape letters as in `ops`, and B = R * Hs requests.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PageRequests(NamedTuple):
    """The requests of one call, and what they come to."""

    indptr: Tensor  # int32 [B + 1]
    indices: Tensor  # int32 [B * longest possible list]: defined up to indptr[B]
    last_page_len: Tensor  # int32 [B], 0 for an empty list
    attended: Tensor  # int32 [R, H]: tokens each query head attends to
    read: Tensor  # int32 [R, G]: tokens of the union over the kv head's query heads
    heads: int  # query heads of a request, H / Hs
    kv_heads: int  # kv heads of a request: G where one list serves all heads, else 1

    @property
    def group(self) -> int:
        """Query heads that share a kv head in a request."""
        return self.heads // self.kv_heads


def page_requests(
    kv: Tensor,
    heads: int,
    page_table: Tensor,
    lengths: Tensor,
    index: Tensor | None = None,
    count: Tensor | None = None,
) -> PageRequests:
    """The requests for H query heads a row; index and count as `ops.attend` takes them."""
    pages, kv_heads, _, size, _ = kv.shape
    rows, slots = page_table.shape
    if index is None or count is None:
        index = page_table.new_empty(rows, 1, 0)
        count = page_table.new_full((rows, 1), -1)
    lists = index.shape[1]
    known = (lengths > 0) & (lengths <= slots * size)
    last = torch.where(known, (lengths - 1) // size, -1)[:, None, None]
    item, named = _items(index, count, last, slots)
    page = page_table.long().gather(1, item.flatten(1).clamp(0, slots - 1)).view_as(item)
    named = named & (page >= 0) & (page < pages)
    is_open = named & (item == last)
    many = named.sum(2, keepdim=True)
    place = torch.where(is_open, many - 1, (named & ~is_open).cumsum(2) - 1)
    ends = many.flatten().cumsum(0)
    starts = (ends - many.flatten()).view_as(many)
    heads_apart = torch.arange(lists, device=kv.device) * kv_heads // lists
    physical = page if lists == 1 else page * kv_heads + heads_apart[:, None]
    beyond = item.numel()
    indices = torch.zeros(beyond + 1, dtype=torch.int32, device=kv.device)
    where = torch.where(named, starts + place, beyond)
    indices.scatter_(0, where.flatten(), physical.int().flatten())

    open_tokens = (lengths[:, None] - last[:, :, 0] * size).expand(rows, lists)
    full = torch.where(many[:, :, 0] > 0, size, 0)
    last_page_len = torch.where(is_open.any(2), open_tokens, full)
    tokens = (many[:, :, 0] - 1).clamp(min=0) * size + last_page_len
    indptr = torch.cat((ends.new_zeros(1), ends))
    return PageRequests(
        indptr.int(),
        indices[:beyond],
        last_page_len.int().flatten(),
        tokens.int().repeat_interleave(heads // lists, 1),
        _read(item, named, lengths, kv_heads, slots, size),
        heads // lists,
        kv_heads if lists == 1 else 1,
    )


def request_pages(kv: Tensor, kv_heads: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a pool [N, G, 2, S, D] as requests of so many kv heads number their pages:

    views [N, G, S, D], or [N * G, 1, S, D] for one kv head; both have the same strides.
    """
    views = kv if kv_heads == kv.shape[1] else kv.flatten(0, 1)[:, None]
    return views[:, :, 0], views[:, :, 1]


def _items(index: Tensor, count: Tensor, last: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Logical pages int64 [R, Hs, W] of all lists, those of rows that take everything written out,
    and which of them are named."""
    width = max(index.shape[2], slots)
    slot = torch.arange(width, device=index.device)
    listed = torch.nn.functional.pad(index.long(), (0, width - index.shape[2]), value=-1)
    everything = count[:, :, None] < 0
    item = torch.where(everything, slot, listed)
    many = torch.where(everything, last + 1, count[:, :, None])
    return item, (slot < many) & (item >= 0) & (item <= last)


def _read(
    item: Tensor, named: Tensor, lengths: Tensor, kv_heads: int, slots: int, size: int
) -> Tensor:
    """Tokens of the pages that any query head of a kv head names, int32 [R, G]."""
    rows, apart = item.shape[0], min(item.shape[1], kv_heads)
    any_names = torch.zeros(rows, apart, slots + 1, dtype=torch.bool, device=item.device)
    pages = torch.where(named, item, slots).reshape(rows, apart, -1)
    any_names.scatter_(2, pages, torch.ones_like(pages, dtype=torch.bool))
    starts = torch.arange(slots, device=item.device) * size
    held = (lengths[:, None] - starts).clamp(0, size)
    tokens = (any_names[:, :, :slots] * held[:, None]).sum(2)
    return tokens.int().expand(rows, kv_heads).contiguous()
