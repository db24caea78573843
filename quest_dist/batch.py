"""One batch of rows under several methods: the single attention path of accuracy and latency.

A batch's rows come in *groups*, one a method, contiguous and in order. Every layer of a decode step
goes

    append -> method.select -> method.attend (ops.attend) -> method.observe

and counts what was really attended. Layers in which a group is not active attend to everything and
its method does not see them. Neighbouring rows that attend to everything, whatever their groups, do
so in one call. Prefill is dense, exact and causal for every method.

Invariant: a row's result depends on its own tokens and method only, never on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from quest_dist import ops
from quest_dist.group import Group, Measured
from quest_dist.methods.method import EVERYTHING, Selection, View
from quest_dist.methods.traffic import CacheShape
from quest_dist.pool import Geometry, Pool, Rows

__all__ = ["Batch", "Group", "Measured", "Rotate", "new_batch"]

Rotate = Callable[[Tensor, Tensor], Tensor]


class Batch:
    """Rows, their groups and their cache."""

    def __init__(
        self,
        rows: Rows,
        groups: Sequence[Group],
        rotate: Rotate,
        observers: Sequence[Group] = (),
    ) -> None:
        """`observers` are groups without rows yet, whose methods look at the prefill of row 0 (see
        `fork`)."""
        assert not groups or sum(len(group.budgets) for group in groups) == len(rows)
        self.rows = rows
        self.groups = list(groups)
        self._observers = list(observers)
        self.rotate = rotate
        self.measured = [Measured() for _ in range(len(rows))]
        self._spans = self._span_groups()
        self._layers_done = [0] * rows.pool.geometry.layers
        self._forwards = 0
        self._decode_steps = 0
        self._weighed = 0
        self._counts: list[tuple[int, Tensor, Tensor]] = []
        self._unused_padding = [0] * len(rows)
        self._step_lengths: tuple[int, ...] = ()

    @property
    def pool(self) -> Pool:
        """The pages of these rows."""
        return self.rows.pool

    def _span_groups(self) -> list[tuple[int, int]]:
        spans, first = [], 0
        for group in self.groups:
            spans.append((first, first + len(group.budgets)))
            first = spans[-1][1]
        return spans

    def fork(self, groups: Sequence[Group]) -> Batch:
        """A batch of rows that all continue row 0 of this one; its methods have seen the
        prefill."""
        count = sum(len(group.budgets) for group in groups)
        batch = Batch(self.rows.fork(0, count), groups, self.rotate)
        length = self.rows.lengths_list[0]
        for group in batch.groups:
            lengths = [length] * len(group.budgets)
            group.begin(lengths, self.pool.geometry, self.pool.page_size, one_prefix=True)
        return batch

    def write(self, layer: int, k: Tensor, v: Tensor, padding: Sequence[int] | None) -> None:
        """Append k, v [R, G, n, D] of one layer; `padding[r]` leading tokens of row r are not part
        of it."""
        if self._layers_done[layer] == self._forwards:
            self._forwards += 1
            new = k.shape[2]
            self._unused_padding = [0] * len(self.rows) if padding is None else list(padding)
            self.rows.extend([new - pad for pad in self._unused_padding])
        self._layers_done[layer] += 1
        if any(self._unused_padding):
            for row, pad in enumerate(self._unused_padding):
                self.rows.append_row(
                    layer, row, k[row : row + 1, :, pad:], v[row : row + 1, :, pad:]
                )
        else:
            self.rows.append(layer, k, v)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Attention of the tokens just written: q [R, H, n, D] -> [R, n, H, D]. One token a row is
        a decode step, unless there are no groups: a context of one token is prefilled too."""
        if q.shape[2] == 1 and self.groups and not any(self._unused_padding):
            return self._decode(layer, q[:, :, 0], scale).unsqueeze(1)
        return self._prefill(layer, q, k, v, scale)

    def _prefill(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], q.shape[3])
        for row, pad in enumerate(self._unused_padding):
            queries = q[row : row + 1, :, pad:]
            keys, values = k[row : row + 1, :, pad:], v[row : row + 1, :, pad:]
            if self.rows.lengths_list[row] > keys.shape[2]:
                keys, values = self.rows.gather(layer, row)
            out[row : row + 1, pad:] = ops.prefill_attend(queries, keys, values, scale)
            watching = [
                (group, first) for group, first, last in self._watching() if first <= row < last
            ]
            for group, first in watching:
                if group.method.needs_prefill and group.active(layer):
                    group.method.observe_prefill(layer, row - first, queries, keys, scale)
        return out

    def _watching(self) -> list[tuple[Group, int, int]]:
        own = [(group, *span) for group, span in zip(self.groups, self._spans, strict=True)]
        return own + [(group, 0, 1) for group in self._observers]

    def _decode(self, layer: int, q: Tensor, scale: float) -> Tensor:
        if self._decode_steps == 0 or layer == 0:
            self._start_step()
        out = torch.empty_like(q)
        everything: list[tuple[Group, int, int]] = []
        for group, (first, last) in zip(self.groups, self._spans, strict=True):
            if group.active(layer):
                method = group.method
                group.enter(layer)
                view = self._view(layer, first, last, scale, method.backend)
                selection = method.select(view, q[first:last])
                self.watch(first, view, q[first:last], selection)
                alone = method.attends or method.needs_probabilities
                if selection.index is not None or alone:
                    out[first:last] = self._attend_group(group, first, view, q, selection)
                    continue
            everything.append((group, first, last))
        for run in _runs(everything):
            first, last = run[0][1], run[-1][2]
            view = self._view(layer, first, last, scale, run[0][0].method.backend)
            result = view.attend(q[first:last], EVERYTHING, probabilities=False)
            out[first:last] = result.out
            for group, start, end in run:
                if group.active(layer):
                    mine = slice(start - first, end - first)
                    self._counts.append((start, result.attended[mine], result.read[mine]))
        return out

    def _view(self, layer: int, first: int, last: int, scale: float, through: ops.Through) -> View:
        rows, pool = self.rows, self.pool
        return View(
            layer=layer,
            step=self._decode_steps,
            kv=pool.kv[layer],
            meta=pool.meta[layer],
            page_table=rows.page_table[first:last],
            lengths=rows.lengths[first:last],
            lengths_list=self._step_lengths[first:last],
            page_size=pool.page_size,
            heads=pool.geometry.heads,
            kv_heads=pool.geometry.kv_heads,
            scale=scale,
            rotate=self.rotate,
            through=through,
        )

    def _attend_group(
        self, group: Group, first: int, view: View, q: Tensor, selection: Selection
    ) -> Tensor:
        method = group.method
        result = method.attend(view, q[first : first + len(group.budgets)], selection)
        if result.probabilities is not None:
            method.observe(view, selection, result.probabilities)
        self._counts.append((first, result.attended, result.read))
        return result.out

    def watch(self, first: int, view: View, q: Tensor, selection: Selection) -> None:
        """See what the rows of a group, from row `first` on, are about to attend to. Nothing is
        done with it here."""

    def _start_step(self) -> None:
        before = [length - 1 for length in self.rows.lengths_list]
        for group, (first, last) in zip(self.groups, self._spans, strict=True):
            if not group.method.budgets:
                size = self.pool.page_size
                group.begin(before[first:last], self.pool.geometry, size, one_prefix=False)
        self._decode_steps += 1
        self._step_lengths = tuple(self.rows.lengths_list)
        for group, (first, last) in zip(self.groups, self._spans, strict=True):
            for row in range(first, last):
                self._plan(group, row, row - first)
        self._weigh_held()

    def _plan(self, group: Group, row: int, place: int) -> None:
        """Count a step of a row, and what its method promises of it."""
        measured, size = self.measured[row], self.pool.page_size
        shares = group.layers_of(place) or {group.budgets[place]: [0]}
        layers = sum(map(len, shares.values()))
        least = most = 0
        for budget, mine in shares.items():
            low, high = group.method.planned(self._step_lengths[row], budget, size, measured.steps)
            least, most = least + low * len(mine), most + high * len(mine)
        measured.planned_low += least / layers
        measured.planned_high += most / layers
        measured.steps += 1

    def _weigh_held(self) -> None:
        shape = self.cache_shape
        for group, (first, last) in zip(self.groups, self._spans, strict=True):
            for row in range(first, last):
                length, shares = self._step_lengths[row], group.layers_of(row - first)
                held = self._dense_bytes(length, shares)
                for budget, mine in shares.items():
                    held += len(mine) * group.method.bytes_held(shape, length, budget)
                self.measured[row].bytes_held += held

    def _dense_bytes(self, length: int, shares: Mapping[int, Sequence[int]]) -> float:
        """Of the layers that are not shared out."""
        dense = self.pool.geometry.layers - sum(map(len, shares.values()))
        return dense * length * self.cache_shape.token_bytes

    @property
    def cache_shape(self) -> CacheShape:
        """What one layer's cache is made of."""
        shape = self.pool.geometry
        return CacheShape(shape.kv_heads, shape.head_dim, shape.dtype.itemsize, self.pool.page_size)

    def _weigh_moved(self, reads: Mapping[int, Sequence[Sequence[int]]]) -> None:
        """Add the bytes of a step in which the rows of the group that begins at a row read so many
        tokens, by active layer and row, over all kv heads."""
        shape = self.cache_shape
        for group, (first, last) in zip(self.groups, self._spans, strict=True):
            for row in range(first, last):
                length, shares = self._step_lengths[row], group.layers_of(row - first)
                moved = self._dense_bytes(length, shares)
                for budget, mine in shares.items():
                    # A draft leaves the model early: only layers that ran have read.
                    ran = [reads[first][layer] for layer in mine if layer < len(reads[first])]
                    if ran:
                        mean = sum(read[row - first] for read in ran) / len(ran) / shape.kv_heads
                        moved += len(ran) * group.method.bytes_moved(shape, length, budget, mean)
                self.measured[row].bytes_moved += moved

    def count(self) -> None:
        """Add what the last step attended to `measured`. Call once a step, after the forward
        pass."""
        totals: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for first, *counted in self._counts:
            totals.setdefault(first, []).append((counted[0], counted[1]))
        self._counts.clear()
        reads: dict[int, list[list[int]]] = {}
        for first, layers in totals.items():
            for place, name in enumerate(("attended", "read")):
                counts = torch.stack([layer[place] for layer in layers])
                by_layer = counts.sum(2).tolist()
                for row, found in enumerate(zip(*by_layer, strict=True), first):
                    mean = sum(found) / (len(layers) * counts.shape[2])
                    measured = self.measured[row]
                    setattr(measured, name, getattr(measured, name) + mean)
                if name == "read":
                    reads[first] = by_layer
        if self._weighed < self._decode_steps:
            self._weighed = self._decode_steps
            self._weigh_moved(reads)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with the rows named (ascending); the others have finished."""
        assert list(rows) == sorted(rows)
        groups = []
        for group, (first, last) in zip(self.groups, self._spans, strict=True):
            mine = [row - first for row in rows if first <= row < last]
            if mine:
                if len(mine) < last - first:
                    group.keep(mine)
                groups.append(group)
        self.groups = groups
        self.rows.keep(rows)
        self.measured = [self.measured[row] for row in rows]
        self._unused_padding = [0] * len(self.rows)
        self._spans = self._span_groups()


def _runs(spans: Sequence[tuple[Group, int, int]]) -> list[list[tuple[Group, int, int]]]:
    """Spans of rows, cut where rows between them are missing or the backend changes."""
    runs: list[list[tuple[Group, int, int]]] = []
    for span in spans:
        if runs:
            group, _, last = runs[-1][-1]
            if last == span[1] and group.method.backend == span[0].method.backend:
                runs[-1].append(span)
                continue
        runs.append([span])
    return runs


def new_batch(
    geometry: Geometry,
    page_size: int,
    groups: Sequence[Group],
    rows: int,
    rotate: Rotate,
    reserve: int = 0,
    observers: Sequence[Group] = (),
    device: torch.device | str = "cpu",
) -> Batch:
    """A batch of empty rows over a pool of its own on `device`, with room for `reserve` tokens."""
    pool = Pool(geometry, page_size, pages=rows + reserve // page_size, device=device)
    return Batch(Rows(pool, rows), groups, rotate, observers)
