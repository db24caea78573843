"""SnapKV (Li et al., NeurIPS 2024, arXiv 2404.14469): the context is cut once, by what its last
queries look at.

When the context has been prefilled, each kv head keeps `budget` of its tokens for good: the last
`window`, and those of the rest that the window's queries attend to most. A token's votes are its
attention probabilities summed over these queries, averaged over the group's query heads and then
pooled over its neighbours (`kernel`), so that what surrounds a vote is kept with it. All that comes
after the context is kept too: a decode step attends to the budget and every token since.

The window is the end of what is prefilled. Under a protocol that decodes the question token by
token it holds the material's end and not the question, by which SnapKV's own evaluation chooses.
With `layer_budgets=pyramid` this is PyramidKV (arXiv 2406.02069).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from quest_dist import ops
from quest_dist.methods.evicting import Evicting
from quest_dist.methods.method import check_choice
from quest_dist.methods.slots import Slots
from quest_dist.methods.traffic import CacheShape

POOLINGS = ("max", "avg")


@dataclass
class SnapKV(Evicting):
    """Settings: `window` last tokens that are always kept and vote (32); `kernel` neighbours that
    are pooled, an odd number (7; 1: none); `pooling` max | avg; `count_include_pad`: whether avg
    divides by the whole kernel at the ends, as the released code does.
    """

    needs_probabilities: ClassVar[bool] = False
    needs_prefill: ClassVar[bool] = True
    cuts_once: ClassVar[bool] = True

    window: int = 32
    kernel: int = 7
    pooling: str = "max"
    count_include_pad: bool = True
    _queries: dict[tuple[int, int], Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Validate the settings."""
        check_choice("pooling", self.pooling, POOLINGS)
        if self.window < 1:
            raise ValueError(f"window={self.window}: at least 1 query must vote")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel={self.kernel}: choose an odd number of neighbours, such as 7")

    def lists(self, kv_heads: int) -> int:
        """One a kv head."""
        return kv_heads

    def reserved(self, page_size: int) -> int:
        """The window, which PyramidKV keeps in every layer too."""
        return self.window

    def check_budget(self, budget: int, page_size: int) -> None:
        """The window must fit."""
        super().check_budget(budget, page_size)
        if budget < self.window:
            raise ValueError(
                f"budget={budget}: snapkv with window={self.window} needs at least"
                f" {self.window} tokens"
            )

    def observe_prefill(self, layer: int, row: int, q: Tensor, k: Tensor, scale: float) -> None:
        """Count the votes of the last `window` queries seen so far, whatever chunk they were in:
        fp32 [G, L], pooled."""
        before = self._queries.get((layer, row))
        if before is not None:
            q = torch.cat((before, q), 2)
        last = q[:, :, -self.window :].clone()
        self._queries[layer, row] = last
        votes = ops.column_sums(last, k, scale)[0]
        votes = votes.view(k.shape[1], -1, k.shape[2]).mean(1)
        rows = self._context.setdefault(layer, [])
        rows[row : row + 1] = [self._pooled(votes)]

    def _pooled(self, votes: Tensor) -> Tensor:
        """Votes [G, L] for the tokens before the window, pooled; those in it get none."""
        pooled = torch.zeros_like(votes)
        older = votes[:, : -self.window]
        if older.shape[1]:
            side = self.kernel // 2
            if self.pooling == "max":
                older = torch.nn.functional.max_pool1d(older, self.kernel, 1, side)
            else:
                older = torch.nn.functional.avg_pool1d(
                    older, self.kernel, 1, side, count_include_pad=self.count_include_pad
                )
            pooled[:, : -self.window] = older
        return pooled

    def context_scores(self, seen: Tensor, length: int) -> Tensor:
        """The pooled votes."""
        return seen

    def evict(self, slots: Slots, newest: Sequence[int]) -> None:
        """Cut each row to its budget; the window is protected."""
        slots.evict(list(self.budgets), [t - self.window + 1 for t in newest])

    def planned(self, length: int, budget: int, page_size: int, step: int) -> tuple[int, int]:
        """The budget, or the context while it is shorter, and all tokens since: step + 1."""
        tokens = min(length, budget + step + 1)
        return tokens, tokens

    def bytes_moved(self, shape: CacheShape, length: int, budget: int, read: float) -> float:
        """What is attended to."""
        return read * shape.token_bytes

    def bytes_held(self, shape: CacheShape, length: int, budget: int) -> float:
        """The budget of the context, and all tokens since."""
        prefilled = self._lengths[0] if self._lengths else length
        return (min(prefilled, budget) + length - prefilled) * shape.token_bytes
