"""H2O, heavy-hitter oracle (Zhang et al., NeurIPS 2023, arXiv 2306.14048): keep what has drawn most
attention so far.

Each kv head accumulates the attention probability that its tokens have received, summed over the
group's query heads. A step attends to the held tokens and the new one (budget of them in all); then
the token with the smallest sum is evicted for good, except that the newest R are never evicted.
Half of the budget is recent window, as in the paper.

`score_init=decode_only` is the protocol of the Quest paper: scores start at the first decode step,
whose attention over the whole context decides the first cut. `prompt` starts from the column sums
of the prefill, as H2O's own code does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from quest_dist import ops
from quest_dist.methods.method import Method, Selection, View, check_choice
from quest_dist.methods.slots import Slots

SCORE_INITS = ("decode_only", "prompt")
NORMALISATIONS = ("none", "per_query_count")


@dataclass
class H2O(Method):
    """Settings: `recent_share` of the budget that is recent window; `score_init` decode_only |
    prompt; `normalise` none | per_query_count (divide each sum by the number of queries that could
    see the token; only with `prompt`).
    """

    needs_probabilities: ClassVar[bool] = True

    recent_share: float = 0.5
    score_init: str = "decode_only"
    normalise: str = "none"
    _slots: dict[int, Slots] = field(default_factory=dict, init=False, repr=False)
    _sums: dict[int, list[Tensor]] = field(default_factory=dict, init=False, repr=False)
    _lengths: tuple[int, ...] = field(default=(), init=False, repr=False)

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

    def check_budget(self, budget: int, page_size: int) -> None:
        """One heavy hitter or recent token beside the new one, at least."""
        super().check_budget(budget, page_size)
        if budget < 2:
            raise ValueError(f"budget={budget}: h2o needs at least 2 tokens (one held, one new)")

    def begin(self, budgets: Sequence[int], lengths: Sequence[int]) -> None:
        """Serve these rows."""
        super().begin(budgets, lengths)
        self._lengths = tuple(lengths)

    def observe_prefill(self, layer: int, row: int, q: Tensor, k: Tensor, scale: float) -> None:
        """Sum the probabilities that each context token receives, per kv head."""
        sums = ops.column_sums(q, k, scale)[0]
        sums = sums.view(k.shape[1], -1, k.shape[2]).sum(1)
        rows = self._sums.setdefault(layer, [])
        if row == len(rows):
            rows.append(sums)
        else:
            earlier = rows[row]
            rows[row] = (
                torch.nn.functional.pad(earlier, (0, sums.shape[1] - earlier.shape[1])) + sums
            )

    def _held(self, layer: int, lists: int) -> Slots:
        if layer not in self._slots:
            slots = self._slots[layer] = Slots(self._lengths, lists)
            if self.score_init == "prompt":
                self._score_prompt(slots, layer)
                self._evict(slots, [length - 1 for length in self._lengths])
        return self._slots[layer]

    def _score_prompt(self, slots: Slots, layer: int) -> None:
        sums = self._sums.get(layer, [])  # nothing was prefilled: decoding began on an empty cache
        for row, length in enumerate(self._lengths if sums else ()):
            score = sums[row if len(sums) > 1 else 0]
            if self.normalise == "per_query_count":
                score = score / torch.arange(length, 0, -1)
            slots.score[row, :, :length] = score

    def select(self, view: View, q: Tensor) -> Selection:
        """The held tokens and the new one."""
        slots = self._held(view.layer, view.kv_heads)
        slots.append(view.lengths_list)
        return slots.selection()

    def observe(self, view: View, selection: Selection, probabilities: Tensor) -> None:
        """Accumulate, then evict."""
        slots = self._slots[view.layer]
        rows, heads, width = probabilities.shape
        group = heads // view.kv_heads
        slots.score[:, :, :width] += probabilities.view(rows, view.kv_heads, group, width).sum(2)
        self._evict(slots, [length - 1 for length in view.lengths_list])

    def _evict(self, slots: Slots, newest: Sequence[int]) -> None:
        capacity = [budget - 1 for budget in self.budgets]
        recent = [int(most * self.recent_share) for most in capacity]
        protected = [t - r + 1 for t, r in zip(newest, recent, strict=True)]
        slots.evict(capacity, protected)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with the rows named."""
        super().keep(rows)
        self._lengths = tuple(self._lengths[row] for row in rows)
        for slots in self._slots.values():
            slots.keep(rows)

    def planned(self, length: int, budget: int, page_size: int, step: int) -> tuple[int, int]:
        """The budget; with decode_only the first step still attends to everything."""
        if step == 0 and self.score_init == "decode_only":
            return length, length
        tokens = min(length, budget)
        return tokens, tokens
