"""Int8 pages: the copy of page metadata in eight bits that a method scores its rows by.

A layer's copy is indexed as the pool's pages are, made from the metadata of each row's prefilled
pages when the layer is first scored, and extended whenever a page closes.

Invariants:
  - scale and offset of a row come from the pages that its prefill closed (where it closed none,
    from the first page), whenever they are asked for: neither other rows nor earlier steps matter;
  - rows that share a page share all that their prefill closed, hence its scale, and its codes are
    made once; a page that has closed does not change while a row holds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quest_dist import ops
from quest_dist.metadata import Int8Metadata, encoded, fitted
from quest_dist.methods.method import Gqa, View


@dataclass
class _Layer:
    """One layer's codes, and how many pages of each row have them."""

    meta: Int8Metadata
    done: list[int]


class Int8Pages:
    """The metadata of one method instance's rows, whose contexts were prefilled to `lengths`."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self._prefilled = list(lengths)
        self._layers: dict[int, _Layer] = {}

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with the rows named."""
        self._prefilled = [self._prefilled[row] for row in rows]
        for layer in self._layers.values():
            codes, scale, offset = layer.meta
            chosen = list(rows)
            layer.meta = Int8Metadata(codes, scale[chosen], offset[chosen])
            layer.done = [layer.done[row] for row in rows]

    def page_scores(
        self, view: View, q: Tensor, radius_scale: float, reduce: Gqa, *, score_open: bool
    ) -> Tensor:
        """`View.page_scores` by the codes of the pages closed so far; an open page has none and is
        scored by its keys."""
        layer = self._layer(view)
        self._read_closed(layer, view)
        return ops.page_scores(
            q,
            view.kv,
            layer.meta,
            view.page_table,
            view.lengths,
            radius_scale=radius_scale,
            reduce=reduce,
            score_open=score_open,
        )

    def _layer(self, view: View) -> _Layer:
        """The codes of a layer, as many as the pool has pages."""
        pages, rest = view.meta.shape[0], view.meta.shape[1:]
        layer = self._layers.get(view.layer)
        if layer is None:
            rows = len(self._prefilled)
            codes = torch.zeros(pages, *rest, dtype=torch.int8)
            meta = Int8Metadata(codes, torch.ones(rows, *rest), torch.zeros(rows, *rest))
            layer = self._layers[view.layer] = _Layer(meta, [0] * rows)
        held = layer.meta.codes
        if held.shape[0] < pages:
            grown = torch.zeros(pages, *rest, dtype=torch.int8)
            grown[: held.shape[0]] = held
            layer.meta = layer.meta._replace(codes=grown)
        return layer

    def _read_closed(self, layer: _Layer, view: View) -> None:
        """Give codes to the pages that have closed since the last time."""
        prefixes: dict[tuple[int, ...], int] = {}
        _, scale, offset = layer.meta
        for row, length in enumerate(view.lengths_list):
            closed = (length - 1) // view.page_size
            if closed and not layer.done[row]:
                fixed = max(1, self._prefilled[row] // view.page_size)
                ids = view.page_table[row, :fixed]
                like = prefixes.setdefault(tuple(ids.tolist()), row)
                if like == row:
                    scale[row], offset[row] = fitted(view.meta[ids.long()])
                    self._encode(layer.meta, view, row, slice(fixed))
                else:
                    scale[row], offset[row] = scale[like], offset[like]
                layer.done[row] = fixed
            if layer.done[row] < closed:
                self._encode(layer.meta, view, row, slice(layer.done[row], closed))
                layer.done[row] = closed

    @staticmethod
    def _encode(meta: Int8Metadata, view: View, row: int, pages: slice) -> None:
        ids = view.page_table[row, pages].long()
        meta.codes[ids] = encoded(view.meta[ids], meta.scale[row], meta.offset[row])
