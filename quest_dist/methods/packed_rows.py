"""Packed rows: the copy of its rows' tokens in few bits that a method attends to.

What is packed when, is KIVI's (arXiv 2402.02750): of `past` tokens before the new one, keys in lots
of `residual` as these fill, values one by one once `residual` younger ones are there. The rest, the
new token included, stays as it is in the pool. A block (see quest_dist.packing) holds a group.

Invariants:
  - what a token is packed to depends on the tokens of its own row alone, and not on when;
  - blocks that lie within whole pages of a prefix are packed once for all rows that share it; a
    row's other blocks are its own;
  - all layers number their blocks alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quest_dist import ops
from quest_dist.methods.method import View, as_int32
from quest_dist.methods.traffic import CacheShape
from quest_dist.packing import BITS, Layout, Packed, uniform


@dataclass(frozen=True)
class Packing:
    """How tokens are packed: `bits` a code, `group` tokens (keys) or channels (values) a scale, and
    `residual` tokens that wait."""

    bits: int
    group: int
    residual: int

    def __post_init__(self) -> None:
        """Raise ValueError for settings that make no packing."""
        if self.bits not in BITS:
            raise ValueError(f"bits={self.bits}: choose one of {', '.join(map(str, BITS))}")
        if self.group < 16 or self.group % 16:
            raise ValueError(f"group={self.group}: choose a multiple of 16")
        if self.residual < self.group or self.residual % self.group:
            raise ValueError(f"residual={self.residual}: choose a multiple of group={self.group}")

    def check_head(self, head_dim: int | None) -> None:
        """Raise ValueError for a head (None: not known) that is not made of whole groups."""
        if head_dim is not None:
            Layout(self.bits, self.group, head_dim)

    def ends(self, past: int) -> tuple[int, int]:
        """Of `past` tokens, how many keys and how many values are packed."""
        return past // self.residual * self.residual, max(0, past - self.residual)

    def bytes(self, shape: CacheShape, length: int, past: int) -> float:
        """The cache of one layer: `length` tokens, of which `past` have been considered for
        packing; a code and its share of a scale and a minimum for what is packed."""
        keys, values = self.ends(past)
        elements = shape.kv_heads * shape.head_dim
        width = min(self.group, shape.head_dim)
        packed = keys * (self.bits + 32 / self.group) + values * (self.bits + 32 / width)
        return elements * packed / 8 + (2 * length - keys - values) * shape.vector_bytes


@dataclass
class _Prefix:
    """Blocks that rows share: `blocks` of them at most, `done` of their keys and values packed."""

    blocks: int
    ids: list[int] = field(default_factory=list)
    done: list[int] = field(default_factory=lambda: [0, 0])


@dataclass
class _Row:
    prefix: _Prefix
    ids: list[int]  # of the blocks behind the prefix's
    done: list[int]


class PackedRows:
    """The packed tokens of one method instance's rows, whose contexts were prefilled to `lengths`
    tokens."""

    def __init__(self, packing: Packing, lengths: Sequence[int]) -> None:
        self._packing = packing
        self._prefilled = list(lengths)
        self._rows: list[_Row] = []
        self._free: list[int] = []
        self._made = 0
        self._layers: dict[int, Tensor] = {}
        self._step = -1

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with the rows named."""
        self._prefilled = [self._prefilled[row] for row in rows]
        if not self._rows:
            return
        for number, row in enumerate(self._rows):
            if number not in rows:
                self._free += row.ids
        self._rows = [self._rows[row] for row in rows]

    def packed(self, view: View) -> Packed:
        """One layer of the rows in the step that `view` shows, packed as far as they should be."""
        if self._step != view.step:
            self._advance(view)
            self._step = view.step
        blocks = self._blocks(view)
        keys, values = self._ends
        packed = Packed(blocks, self._table, keys, values, self._levels, self._packing.group)
        ops.pack(packed, view.kv, view.page_table, *self._starts)
        return packed

    def _blocks(self, view: View) -> Tensor:
        """The blocks of a layer, as many as have been made."""
        held = self._layers.get(view.layer)
        if held is None or held.shape[0] < self._made:
            packing, heads = self._packing, view.kv.shape[1]
            layout = Layout(packing.bits, packing.group, view.kv.shape[4])
            room = max(self._made, 2 * held.shape[0] if held is not None else 1)
            grown = ops.allocate_blocks(room, heads, layout, view.kv.device)
            if held is not None:
                grown[: held.shape[0]] = held
            held = self._layers[view.layer] = grown
        return held

    def _advance(self, view: View) -> None:
        """Say what this step packs, and where."""
        if not self._rows:
            self._rows = self._first_rows(view)
            self._levels = uniform(self._packing.bits).to(view.kv.device)
        group = self._packing.group
        starts: list[tuple[int, ...]] = []
        ends: list[tuple[int, int]] = []
        leading: set[int] = set()
        for row, length in zip(self._rows, view.lengths_list, strict=True):
            ends.append(self._packing.ends(length - 1))
            leads = id(row.prefix) not in leading
            leading.add(id(row.prefix))
            starts.append(tuple(self._start(row, of, ends[-1][of], leads) for of in (0, 1)))
            blocks = ends[-1][0] // group
            while len(row.prefix.ids) < min(blocks, row.prefix.blocks):
                row.prefix.ids.append(self._take())
            while len(row.ids) < blocks - row.prefix.blocks:
                row.ids.append(self._take())
        device = view.lengths.device
        tables = [row.prefix.ids + row.ids for row in self._rows]
        width = max(1, *map(len, tables))
        table = [ids + [0] * (width - len(ids)) for ids in tables]
        self._table = torch.tensor(table, dtype=torch.int32, device=device)
        self._ends = [as_int32([end[of] for end in ends], device) for of in (0, 1)]
        self._starts = [as_int32([start[of] for start in starts], device) for of in (0, 1)]

    def _start(self, row: _Row, of: int, end: int, leads: bool) -> int:
        """From where on a row packs keys (0) or values (1): one row packs what its prefix holds."""
        shared = row.prefix.blocks * self._packing.group
        start = min(row.done[of], end)
        if leads and row.prefix.done[of] < shared:
            start = row.prefix.done[of]
            row.prefix.done[of] = min(end, shared)
        row.done[of] = max(row.done[of], end)
        return start

    def _first_rows(self, view: View) -> list[_Row]:
        """Rows whose whole pages of the prefill are the same share these."""
        prefixes: dict[tuple[int, ...], _Prefix] = {}
        rows, group = [], self._packing.group
        tables: list[list[int]] = view.page_table.tolist()
        for length, table in zip(self._prefilled, tables, strict=True):
            pages = length // view.page_size
            key = (length, *table[:pages])
            prefix = prefixes.setdefault(key, _Prefix(pages * view.page_size // group))
            rows.append(_Row(prefix, [], [prefix.blocks * group] * 2))
        return rows

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        self._made += 1
        return self._made - 1
