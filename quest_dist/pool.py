"""The paged KV store: one pool of pages, and the rows that read it.

A *pool* holds keys and values of every layer in pages of `page_size` tokens; page ids mean the same
page in all layers. A *row* is one sequence: a list of page ids and a length. Rows share pages by
reference count.

Invariants:
  - a page is written only while exactly one row holds it: a shared page is copied on the first
  write;
  - positions of a row are logical (0 = its first token); position p lives in page `p // page_size`
  of its list;
  - `lengths` counts the tokens of the step in progress, the new one included;
  - nobody outside `ops` looks inside a page: the physical layout belongs to the backend.

Shape letters: R rows, G kv heads, D head dim, S page size, N pages of the pool, P pages of the
longest row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quest_dist import ops


@dataclass(frozen=True)
class Geometry:
    """What the pool must hold: the attention shape of a model.

    `heads` are query heads, `kv_heads` the heads that are stored; `window` is the model's sliding
    window in tokens where it has one (sequences may not outgrow it), else None.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    window: int | None = None


class Pool:
    """Pages of all layers with reference counts; grows when it runs out."""

    def __init__(
        self,
        geometry: Geometry,
        page_size: int,
        pages: int,
        device: torch.device | str = "cpu",
    ) -> None:
        if page_size < 1:
            raise ValueError(f"page_size={page_size}: a page holds at least 1 token")
        self.geometry = geometry
        self.page_size = page_size
        self.device = torch.device(device)
        self.kv, self.meta = self._allocate(max(pages, 1))
        self._references = [0] * self.pages
        self._free = list(range(self.pages - 1, -1, -1))

    @property
    def pages(self) -> int:
        """Pages that the pool can hold at present, N."""
        return int(self.kv.shape[1])

    @property
    def free_pages(self) -> int:
        """Pages that no row holds."""
        return len(self._free)

    def _allocate(self, pages: int) -> tuple[Tensor, Tensor]:
        shape = self.geometry
        return ops.allocate_pages(
            shape.layers,
            pages,
            shape.kv_heads,
            self.page_size,
            shape.head_dim,
            shape.dtype,
            self.device,
        )

    def take(self) -> int:
        """The id of a fresh page, held once."""
        if not self._free:
            self._grow()
        page = self._free.pop()
        self._references[page] = 1
        return page

    def share(self, page: int) -> None:
        """Let one more row hold `page`."""
        assert self._references[page] > 0
        self._references[page] += 1

    def release(self, page: int) -> None:
        """Let go of `page`; the last holder frees it."""
        assert self._references[page] > 0
        self._references[page] -= 1
        if self._references[page] == 0:
            self._free.append(page)

    def owned(self, page: int) -> int:
        """A page with the contents of `page` that the caller alone holds: itself, or a copy if it
        is shared."""
        if self._references[page] == 1:
            return page
        copy = self.take()
        self.kv[:, copy] = self.kv[:, page]
        self.meta[:, copy] = self.meta[:, page]
        self.release(page)
        return copy

    def _grow(self) -> None:
        old = self.pages
        kv, meta = self._allocate(2 * old)
        kv[:, :old] = self.kv
        meta[:, :old] = self.meta
        self.kv, self.meta = kv, meta
        self._references += [0] * (self.pages - old)
        self._free += range(self.pages - 1, old - 1, -1)


class Rows:
    """The sequences of one batch over one pool.

    Every layer appends the same tokens; `extend` makes room for them once a step, `append` writes
    one layer.
    """

    def __init__(self, pool: Pool, count: int) -> None:
        self.pool = pool
        self._pages: list[list[int]] = [[] for _ in range(count)]
        self._lengths = [0] * count
        self._refresh()

    def __len__(self) -> int:
        return len(self._pages)

    @property
    def lengths_list(self) -> list[int]:
        """Tokens of each row, the ones of the step in progress included."""
        return list(self._lengths)

    def _refresh(self) -> None:
        longest = max((len(pages) for pages in self._pages), default=0)
        table = [pages + [0] * (longest - len(pages)) for pages in self._pages]
        self.page_table = self._ints(table).reshape(len(table), longest)
        self.lengths = self._ints(self._lengths)

    def _ints(self, values: Sequence[object]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.pool.device)

    def extend(self, counts: Sequence[int]) -> None:
        """Make room for `counts[r]` more tokens in each row and count them in `lengths`.

        Raises ValueError when a row would outgrow the model's sliding window.
        """
        grown = [self._make_room(row, count) for row, count in enumerate(counts)]
        self._lengths = [old + count for old, count in zip(self._lengths, counts, strict=True)]
        if any(grown):
            self._refresh()
        else:
            self.lengths = self._ints(self._lengths)

    def reserve(self, count: int) -> None:
        """Give each row the pages of its next `count` tokens now; `page_table` will not change
        while they come, and `lengths` do not count them yet.

        Raises ValueError as `extend` does.
        """
        for row in range(len(self)):
            self._make_room(row, count)
        self._refresh()

    def _make_room(self, row: int, count: int) -> bool:
        """Pages for `count` more tokens of a row, which it alone holds; whether any are new."""
        size, window = self.pool.page_size, self.pool.geometry.window
        old, new = self._lengths[row], self._lengths[row] + count
        if window is not None and new > window:
            raise ValueError(
                f"sequence of {new} tokens: the model has a sliding window of {window} tokens, "
                "beyond which the patched attention would differ from it; use shorter inputs"
            )
        pages = self._pages[row]
        before = list(pages)
        if count and old % size:
            pages[old // size] = self.pool.owned(pages[old // size])
        while len(pages) * size < new:
            pages.append(self.pool.take())
        return pages != before

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write the newest tokens of every row: k, v [R, G, n, D], n tokens each, already counted
        in `lengths`."""
        ops.append(
            self.pool.kv[layer],
            self.pool.meta[layer],
            self.page_table,
            k,
            v,
            self.lengths - k.shape[2],
        )

    def append_row(self, layer: int, row: int, k: Tensor, v: Tensor) -> None:
        """Write the newest tokens of one row: k, v [1, G, n, D]."""
        self.append_rows(layer, slice(row, row + 1), k, v)

    def append_rows(self, layer: int, rows: slice, k: Tensor, v: Tensor) -> None:
        """Write the newest tokens of some neighbouring rows: k, v [r, G, n, D]."""
        starts = self.lengths[rows] - k.shape[2]
        table = self.page_table[rows]
        ops.append(self.pool.kv[layer], self.pool.meta[layer], table, k, v, starts)

    def gather(self, layer: int, row: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one row as [1, G, L, D] each."""
        table = self.page_table[row : row + 1]
        return ops.gather(self.pool.kv[layer], table, self._lengths[row])

    def fork(self, row: int, count: int) -> Rows:
        """`count` rows that start as copies of `row`, sharing its pages. The original keeps its own
        hold."""
        return self.copies([row] * count)

    def copies(self, rows: Sequence[int]) -> Rows:
        """Rows that start as copies of those named, in this order and as often, sharing their
        pages. The originals keep their own hold."""
        forked = Rows(self.pool, 0)
        for row in rows:
            for page in self._pages[row]:
                self.pool.share(page)
            forked._pages.append(list(self._pages[row]))
            forked._lengths.append(self._lengths[row])
        forked._refresh()
        return forked

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with the rows named (in this order); the others let go of their pages."""
        kept = set(rows)
        for row, pages in enumerate(self._pages):
            if row not in kept:
                for page in pages:
                    self.pool.release(page)
        self._pages = [self._pages[row] for row in rows]
        self._lengths = [self._lengths[row] for row in rows]
        self._refresh()


class Mirror(Rows):
    """Rows that are all the first row of others, for reading alone: they hold no pages.

    `follow` shows them what that row is now; nothing may be written through them.
    """

    def __init__(self, rows: Rows, count: int) -> None:
        super().__init__(rows.pool, count)
        self._shown = rows
        self.follow()

    def follow(self) -> None:
        """Take over the pages and the length of the row shown."""
        count = len(self)
        self._lengths = self._shown.lengths_list[:1] * count
        self.lengths = self._shown.lengths[:1].repeat(count)
        self.page_table = self._shown.page_table[:1].repeat(count, 1)
