"""TOVA, token omission via attention (Oren et al., arXiv 2401.06104).

It evicts the token that the newest query needs least, and has no history: after a step the held
token with the smallest probability, averaged over all query heads, is evicted for good. One list a
layer serves all heads. Nothing is protected, not even the new token once its own step is over. The
context is cut by the probabilities of its last query.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quest_dist import ops
from quest_dist.methods.evicting import Evicting
from quest_dist.methods.method import Selection, View
from quest_dist.methods.slots import Slots


@dataclass
class Tova(Evicting):
    """It has no settings; the cache size is budget - 1, so that a step attends to the budget."""

    needs_prefill: ClassVar[bool] = True

    def lists(self, kv_heads: int) -> int:
        """One for all heads."""
        return 1

    def observe_prefill(self, layer: int, row: int, q: Tensor, k: Tensor, scale: float) -> None:
        """Remember the head-mean probabilities of the last query, fp32 [L]."""
        last = ops.column_sums(q[:, :, -1:], k, scale)[0].mean(0)
        self._context.setdefault(layer, [])[row:] = [last]

    def context_scores(self, seen: Tensor, length: int) -> Tensor:
        """Those probabilities."""
        return seen

    def observe(self, view: View, selection: Selection, probabilities: Tensor) -> None:
        """Score by this step alone, then evict."""
        slots = self._slots[view.layer]
        mean = probabilities[:, :, : slots.width].mean(1)
        slots.score[:, 0, : mean.shape[1]] = mean
        self.evict(slots, [length - 1 for length in view.lengths_list])

    def evict(self, slots: Slots, newest: Sequence[int]) -> None:
        """Nothing is protected."""
        nothing = [torch.iinfo(torch.int32).max] * len(self.budgets)
        slots.evict([budget - 1 for budget in self.budgets], nothing)
