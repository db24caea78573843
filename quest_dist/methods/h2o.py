"""H2O, heavy-hitter oracle (Zhang et al., NeurIPS 2023, arXiv 2306.14048).

It keeps what has drawn most attention so far: each kv head accumulates the attention probability
that its tokens have received, summed over the group's query heads. A step attends to the held
tokens and the new one (budget of them in all); then the token with the smallest sum is evicted for
good, except that the newest R are never evicted. Half of the budget is recent window, as in the
paper.

`score_init=decode_only` is the protocol of the Quest paper: scores start at the first decode step,
whose attention over the whole context decides the first cut. `prompt` starts from the column sums
of the prefill, as H2O's own code does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quest_dist import ops
from quest_dist.methods.evicting import Evicting
from quest_dist.methods.method import Selection, View, check_choice
from quest_dist.methods.slots import Slots

SCORE_INITS = ("decode_only", "prompt")
NORMALISATIONS = ("none", "per_query_count")


@dataclass
class H2O(Evicting):
    """Settings: `recent_share` of the budget that is recent window; `score_init` decode_only |
    prompt; `normalise` none | per_query_count (divide each sum by the number of queries that could
    see the token; only with `prompt`).
    """

    recent_share: float = 0.5
    score_init: str = "decode_only"
    normalise: str = "none"

    def __post_init__(self) -> None:
        """Validate the settings."""
        check_choice("score_init", self.score_init, SCORE_INITS)
        check_choice("normalise", self.normalise, NORMALISATIONS)
        if not 0.0 <= self.recent_share <= 1.0:
            raise ValueError(f"recent_share={self.recent_share}: choose a number from 0 to 1")
        if self.normalise != "none" and self.score_init != "prompt":
            raise ValueError(f"normalise={self.normalise!r} needs score_init='prompt'")

    @property
    def needs_prefill(self) -> bool:  # type: ignore[override]
        """Whether the queries of the prefill are wanted."""
        return self.score_init == "prompt"

    def lists(self, kv_heads: int) -> int:
        """One a kv head."""
        return kv_heads

    def observe_prefill(self, layer: int, row: int, q: Tensor, k: Tensor, scale: float) -> None:
        """Sum the probabilities that each context token receives: fp32 [G, L], over all chunks."""
        sums = ops.column_sums(q, k, scale)[0]
        sums = sums.view(k.shape[1], -1, k.shape[2]).sum(1)
        rows = self._context.setdefault(layer, [])
        if row < len(rows):
            sums[:, : rows[row].shape[1]] += rows[row]
        rows[row : row + 1] = [sums]

    def context_scores(self, seen: Tensor, length: int) -> Tensor:
        """The sums, or their means over the queries that could see the token."""
        if self.normalise == "per_query_count":
            return seen / torch.arange(length, 0, -1, device=seen.device)
        return seen

    def observe(self, view: View, selection: Selection, probabilities: Tensor) -> None:
        """Accumulate, then evict."""
        slots = self._slots[view.layer]
        received = probabilities[:, :, : slots.width]
        rows, heads, width = received.shape
        by_group = received.reshape(rows, view.kv_heads, heads // view.kv_heads, width)
        slots.score[:, :, :width] += by_group.sum(2)
        self.evict(slots, [length - 1 for length in view.lengths_list])

    def evict(self, slots: Slots, newest: Sequence[int]) -> None:
        """The newest R are protected, R = recent_share of budget - 1."""
        capacity = [budget - 1 for budget in self.budgets]
        recent = [int(most * self.recent_share) for most in capacity]
        slots.evict(capacity, [t - r + 1 for t, r in zip(newest, recent, strict=True)])

    def planned(self, length: int, budget: int, page_size: int, step: int) -> tuple[int, int]:
        """The budget; with decode_only the first step still attends to everything."""
        if step == 0 and self.score_init == "decode_only":
            return length, length
        return super().planned(length, budget, page_size, step)
