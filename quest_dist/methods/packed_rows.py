"""Packed rows: the copy of its rows' tokens in few bits that a method attends to.

What is packed when, is KIVI's (arXiv 2402.02750): of `past` tokens before the new one, keys in lots
of `residual` as these fill, values one by one once `residual` younger ones are there. The rest, the
new token included, stays as it is in the pool. A block (see quest_dist.packing) holds a group.

Invariant: what a token is packed to depends on the tokens of its own row alone, and not on when.
Who packs what rows share says quest_dist.methods.block_rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from quest_dist import ops
from quest_dist.methods.block_rows import BlockRows
from quest_dist.methods.method import View
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


class PackedRows:
    """The packed tokens of one method instance's rows, whose contexts were prefilled to `lengths`
    tokens."""

    def __init__(self, packing: Packing, lengths: Sequence[int]) -> None:
        self._packing = packing
        # The new token is not yet considered.
        self._rows = BlockRows(packing.group, lambda length: packing.ends(length - 1), lengths)
        self._layers: dict[int, Tensor] = {}

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with the rows named."""
        self._rows.keep(rows)

    def packed(self, view: View) -> Packed:
        """One layer of the rows in the step that `view` shows, packed as far as they should be."""
        rows = self._rows
        if rows.advance(view):
            self._starts, self._ends = rows.counts(rows.starts), rows.counts(rows.ends)
            self._levels = uniform(self._packing.bits).to(view.kv.device)
        blocks = self._blocks(view)
        keys, values = self._ends
        packed = Packed(blocks, rows.table, keys, values, self._levels, self._packing.group)
        ops.pack(packed, view.kv, view.page_table, *self._starts)
        return packed

    def _blocks(self, view: View) -> Tensor:
        """The blocks of a layer, as many as have been made."""
        held, made = self._layers.get(view.layer), self._rows.made
        if held is None or held.shape[0] < made:
            packing, heads = self._packing, view.kv.shape[1]
            layout = Layout(packing.bits, packing.group, view.kv.shape[4])
            room = max(made, 2 * held.shape[0] if held is not None else 1)
            grown = ops.allocate_blocks(room, heads, layout, view.kv.device)
            if held is not None:
                grown[: held.shape[0]] = held
            held = self._layers[view.layer] = grown
        return held
