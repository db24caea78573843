"""Oracle over tokens: exact attention over the tokens whose true scores are highest.

An upper bound, not a fast method: it reads every key. With `gqa=per_query` each query head takes
the tokens of its own largest q.k; `max` and `mean` make one list a kv head from the probabilities
of the group (probability, not raw score: scores of different heads do not compare). The new token
is always among them.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from quest_dist import ops
from quest_dist.methods.method import (
    EVERYTHING,
    GQA_CHOICES,
    Gqa,
    Method,
    Selection,
    View,
    as_int32,
    check_choice,
)
from quest_dist.methods.traffic import CacheShape


def group_probabilities(scores: Tensor, kv_heads: int, gqa: str) -> Tensor:
    """Scores [R, H, L] -> probabilities of the group [R, G, L], by max or mean over its query
    heads."""
    rows, heads, length = scores.shape
    shares = scores.softmax(-1).view(rows, kv_heads, heads // kv_heads, length)
    return shares.amax(2) if gqa == "max" else shares.mean(2)


@dataclass
class OracleToken(Method):
    """Settings: `gqa` per_query | max | mean."""

    gqa: Gqa = "per_query"

    def __post_init__(self) -> None:
        """Validate the settings."""
        check_choice("gqa", self.gqa, GQA_CHOICES)

    def select(self, view: View, q: Tensor) -> Selection:
        """The new token and the budget - 1 best others."""
        keep = [
            -1 if budget >= length else budget
            for length, budget in zip(view.lengths_list, self.budgets, strict=True)
        ]
        if all(tokens < 0 for tokens in keep):
            return EVERYTHING
        scores = view.token_scores(q)
        if self.gqa != "per_query":
            scores = group_probabilities(scores, view.kv_heads, self.gqa)
        index, count = ops.select_top(
            scores.contiguous(), view.lengths, as_int32(keep, q.device), force_last=True
        )
        return Selection(index, count, "tokens")

    def stateless(self) -> bool:
        """Nothing is kept between steps."""
        return True

    def planned(self, length: int, budget: int, page_size: int, step: int) -> tuple[int, int]:
        """The budget, or all tokens while they are fewer."""
        tokens = min(length, budget)
        return tokens, tokens

    def bytes_moved(self, shape: CacheShape, length: int, budget: int, read: float) -> float:
        """All keys, and the values of what was read."""
        return (length + read) * shape.vector_bytes
