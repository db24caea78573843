"""TOVA, token omission via attention (Oren et al., arXiv 2401.06104): evict the token that the
newest query needs least.

No history: after a step the held token with the smallest probability, averaged over all query
heads, is evicted for good. One list a layer serves all heads. Nothing is protected, not even the
new token once its own step is over. The context is cut by the probabilities of its last query.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from quest_dist import ops
from quest_dist.methods.method import Method, Selection, View
from quest_dist.methods.slots import Slots


@dataclass
class Tova(Method):
    """It has no settings; the cache size is budget - 1, so that with the new token a step attends
    to the budget."""

    needs_probabilities: ClassVar[bool] = True
    needs_prefill: ClassVar[bool] = True

    _slots: dict[int, Slots] = field(default_factory=dict, init=False, repr=False)
    _last: dict[int, list[Tensor]] = field(default_factory=dict, init=False, repr=False)
    _lengths: tuple[int, ...] = field(default=(), init=False, repr=False)

    def check_budget(self, budget: int, page_size: int) -> None:
        """One held token beside the new one, at least."""
        super().check_budget(budget, page_size)
        if budget < 2:
            raise ValueError(f"budget={budget}: tova needs at least 2 tokens (one held, one new)")

    def begin(self, budgets: Sequence[int], lengths: Sequence[int]) -> None:
        """Serve these rows."""
        super().begin(budgets, lengths)
        self._lengths = tuple(lengths)

    def observe_prefill(self, layer: int, row: int, q: Tensor, k: Tensor, scale: float) -> None:
        """Remember the head-mean probabilities of the last query, fp32 [L]."""
        last = ops.column_sums(q[:, :, -1:], k, scale)[0].mean(0)
        rows = self._last.setdefault(layer, [])
        if row == len(rows):
            rows.append(last)
        else:
            rows[row] = last

    def _held(self, layer: int) -> Slots:
        if layer not in self._slots:
            slots = self._slots[layer] = Slots(self._lengths, 1)
            last = self._last.get(
                layer, []
            )  # nothing was prefilled: decoding began on an empty cache
            for row, length in enumerate(self._lengths if last else ()):
                slots.score[row, 0, :length] = last[row if len(last) > 1 else 0]
            self._evict(slots)
        return self._slots[layer]

    def select(self, view: View, q: Tensor) -> Selection:
        """The held tokens and the new one."""
        slots = self._held(view.layer)
        slots.append(view.lengths_list)
        return slots.selection()

    def observe(self, view: View, selection: Selection, probabilities: Tensor) -> None:
        """Score by this step alone, then evict."""
        slots = self._slots[view.layer]
        slots.score[:, 0, : probabilities.shape[2]] = probabilities.mean(1)
        self._evict(slots)

    def _evict(self, slots: Slots) -> None:
        nothing = [torch.iinfo(torch.int32).max] * len(self.budgets)
        slots.evict([budget - 1 for budget in self.budgets], nothing)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with the rows named."""
        super().keep(rows)
        self._lengths = tuple(self._lengths[row] for row in rows)
        for slots in self._slots.values():
            slots.keep(rows)

    def planned(self, length: int, budget: int, page_size: int, step: int) -> tuple[int, int]:
        """The budget, or all tokens while they are fewer."""
        tokens = min(length, budget)
        return tokens, tokens
