"""Rounded pages: the copy of keys and values, each vector in a few bits, that a method attends to.

A vector (one token's key or value of one kv head) goes to `bits` bits on the grid from its smallest
element to its largest: scale = (max - min) / (2^bits - 1), at least 1e-5 and in the dtype of the
cache; x = min + scale round((x - min) / scale), halves to even. Nothing else is clamped: min is
stored, not a rounded zero point, so that vectors of one sign keep their spread. 16 bits are the
identity.

This is a simulation, as the papers' code that uses it: copies are kept in the dtype of the cache
and read by the same kernels; bytes are counted as if they were packed. A layer's copy is indexed as
the pool's pages are; pages that rows share are rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quest_dist import ops
from quest_dist.methods.method import View, as_int32
from quest_dist.methods.traffic import CacheShape

IDENTITY = 16
BITS = (*range(1, 9), IDENTITY)
SMALLEST_SCALE = 1e-5


def rounded(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Vectors x [..., D] on their grids, in the dtype of x, and the L2 norms of what that took from
    them, fp32 [...]."""
    if bits == IDENTITY:
        return x, x.new_zeros(x.shape[:-1], dtype=torch.float32)
    exact = x.float()
    low, levels = exact.amin(-1, keepdim=True), 2**bits - 1
    scale = ((exact.amax(-1, keepdim=True) - low) / levels).clamp(min=SMALLEST_SCALE)
    scale = scale.to(x.dtype).float()
    near = low + scale * ((exact - low) / scale).round().clamp(0, levels)
    return near.to(x.dtype), (near - exact).norm(dim=-1)


def token_bytes(shape: CacheShape, bits: int) -> float:
    """Key and value of one token, packed, with a scale and a min a vector."""
    if bits == IDENTITY:
        return shape.token_bytes
    return 2 * shape.kv_heads * (shape.head_dim * bits / 8 + 2 * shape.element_bytes)


@dataclass
class _Layer:
    """One layer's copy, and how many tokens of each row it has."""

    kv: Tensor
    meta: Tensor
    done: list[int]


class RoundedPages:
    """The rounded cache of one method instance's rows; with `one_prefix` they share the pages that
    their prefill has filled."""

    def __init__(self, bits: int, rows: int, one_prefix: bool) -> None:
        self._bits, self._rows, self._one_prefix = bits, rows, one_prefix
        self._layers: dict[int, _Layer] = {}

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with the rows named."""
        self._rows = len(rows)
        for layer in self._layers.values():
            layer.done = [layer.done[row] for row in rows]

    def kv(self, layer: int) -> Tensor:
        """A layer's copy: read it in the place of `View.kv`."""
        return self._layers[layer].kv

    def read(self, view: View, lengths: Sequence[int]) -> tuple[list[int], list[Tensor]]:
        """Round what the rows have gained up to `lengths`: where that began in each, and its
        errors, fp32 [2, G, new], of keys and of values."""
        layer = self._layer(view)
        starts = list(layer.done)
        layer.done = list(lengths)
        if all(length == start + 1 for length, start in zip(lengths, starts, strict=True)):
            return starts, self._read_newest(layer, view, lengths)
        errors: list[Tensor] = []
        for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            known = errors[0] if row and start == 0 and self._one_prefix else None
            errors.append(self._read_row(layer, view, row, start, length, known))
        return starts, errors

    def _layer(self, view: View) -> _Layer:
        pages, dim = view.kv.shape[0], view.kv.shape[-1]
        layer = self._layers.get(view.layer)
        if layer is None or layer.kv.shape[0] < pages:
            place = view.kv.dtype, view.kv.device
            kv, meta = ops.allocate_pages(1, pages, view.kv_heads, view.page_size, dim, *place)
            if layer is None:
                layer = self._layers[view.layer] = _Layer(kv[0], meta[0], [0] * self._rows)
            else:
                kv[0, : layer.kv.shape[0]] = layer.kv
                meta[0, : layer.kv.shape[0]] = layer.meta
                layer.kv, layer.meta = kv[0], meta[0]
        return layer

    def _read_newest(self, layer: _Layer, view: View, lengths: Sequence[int]) -> list[Tensor]:
        """The newest token of every row, all at once."""
        size, device = view.page_size, view.kv.device
        last = as_int32([(length - 1) // size for length in lengths], device).long()
        table = view.page_table.gather(1, last[:, None])
        slot = as_int32([(length - 1) % size for length in lengths], device).long()
        rows = torch.arange(len(lengths), device=device)
        k, v = (part[rows, :, slot][:, :, None] for part in ops.gather(view.kv, table, size))
        starts = as_int32([length - 1 for length in lengths], device)
        return list(self._write(layer, view.page_table, k, v, starts))

    def _read_row(
        self,
        layer: _Layer,
        view: View,
        row: int,
        start: int,
        length: int,
        known: Tensor | None,
    ) -> Tensor:
        """Tokens `start` to `length` of one row. `known` are the errors of row 0, whose full pages
        are this row's too and stay as they are."""
        size = view.page_size
        new = start if known is None else length // size * size
        first = new // size
        table = view.page_table[row : row + 1, first : max(first + 1, -(-length // size))]
        if new == length:
            errors = torch.zeros(2, view.kv_heads, 0, device=view.kv.device)
        else:
            k, v = ops.gather(view.kv, table, length - first * size)
            k, v = (part[:, :, new - first * size :] for part in (k, v))
            starts = as_int32([new], view.kv.device)
            [errors] = self._write(layer, view.page_table[row : row + 1], k, v, starts)
        return errors if known is None else torch.cat((known[:, :, :new], errors), 2)

    def _write(self, layer: _Layer, table: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Tensor:
        """Round k, v [R, G, n, D] into the copy: errors [R, 2, G, n]."""
        (k, of_keys), (v, of_values) = rounded(k, self._bits), rounded(v, self._bits)
        ops.append(layer.kv, layer.meta, table, k, v, starts)
        return torch.stack((of_keys, of_values), 1)
