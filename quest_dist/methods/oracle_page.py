"""Oracle over pages: Quest's pages chosen by their true content instead of a bound.

The gap between Quest and this is estimation error; the gap between this and the token oracle is
granularity. `score=mass` ranks pages by the log of their summed exp(q.k), which captures most
attention mass among page sets; `max` by their largest q.k. The current page is always attended;
page count as in Quest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
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
from quest_dist.methods.oracle_token import group_probabilities
from quest_dist.methods.quest import check_holds_a_page, pages_of, pages_to_keep, tokens_in_pages
from quest_dist.methods.traffic import CacheShape

SCORES = ("mass", "max")


@dataclass
class OraclePage(Method):
    """Settings: `gqa` per_query | max | mean; `score` mass | max."""

    selects_pages: ClassVar[bool] = True

    gqa: Gqa = "per_query"
    score: str = "mass"

    def __post_init__(self) -> None:
        """Validate the settings."""
        check_choice("gqa", self.gqa, GQA_CHOICES)
        check_choice("score", self.score, SCORES)

    def check_budget(self, budget: int, page_size: int) -> None:
        """The current page must fit."""
        super().check_budget(budget, page_size)
        check_holds_a_page(budget, page_size)

    def select(self, view: View, q: Tensor) -> Selection:
        """The current page and the K - 1 best others."""
        size = view.page_size
        keep = [
            pages_to_keep(length, budget, size)
            for length, budget in zip(view.lengths_list, self.budgets, strict=True)
        ]
        if all(pages < 0 for pages in keep):
            return EVERYTHING
        scores = view.token_scores(q)
        if self.gqa != "per_query":
            scores = group_probabilities(scores, view.kv_heads, self.gqa).log()
        pages = [pages_of(length, size) for length in view.lengths_list]
        padding = max(pages) * size - scores.shape[2]
        scores = torch.nn.functional.pad(scores, (0, padding), value=-torch.inf)
        by_page = scores.view(*scores.shape[:2], max(pages), size)
        ranked = by_page.logsumexp(3) if self.score == "mass" else by_page.amax(3)
        index, count = ops.select_top(
            ranked.contiguous(),
            as_int32(pages, q.device),
            as_int32(keep, q.device),
            force_last=True,
        )
        return Selection(index, count, "pages")

    def stateless(self) -> bool:
        """Nothing is kept between steps."""
        return True

    def planned(self, length: int, budget: int, page_size: int, step: int) -> tuple[int, int]:
        """(K - 1) whole pages and the current one."""
        tokens = tokens_in_pages(length, budget, page_size)
        return tokens, tokens

    def bytes_moved(self, shape: CacheShape, length: int, budget: int, read: float) -> float:
        """All keys, and the values of what was read."""
        return (length + read) * shape.vector_bytes
