"""Evicting methods: hold fewer tokens than were seen, attend to the held ones and the new one.

A step goes: hold the new token, attend to all held, score, evict down to budget - 1. What the
prefill says of the context's tokens is kept per layer and row until the first step needs it. What
is evicted never returns.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from quest_dist.methods.method import Method, Selection, View
from quest_dist.methods.slots import Slots
from quest_dist.methods.traffic import CacheShape

SCORE_BYTES = 4  # a score is fp32


@dataclass
class Evicting(Method):
    """What H2O and TOVA share. `lists` is how many lists of tokens a row holds in a layer."""

    needs_probabilities: ClassVar[bool] = True

    _slots: dict[int, Slots] = field(default_factory=dict, init=False, repr=False)
    _context: dict[int, list[Tensor]] = field(default_factory=dict, init=False, repr=False)
    _lengths: tuple[int, ...] = field(default=(), init=False, repr=False)

    @abstractmethod
    def lists(self, kv_heads: int) -> int:
        """Lists a row: 1 for all heads, or one a kv head."""

    @abstractmethod
    def context_scores(self, seen: Tensor, length: int) -> Tensor:
        """Scores [lists, length] or [length] from what `observe_prefill` kept."""

    @abstractmethod
    def evict(self, slots: Slots, newest: Sequence[int]) -> None:
        """Cut each row to budget - 1 tokens; `newest[r]` is the position of its newest."""

    def check_budget(self, budget: int, page_size: int) -> None:
        """One held token beside the new one, at least."""
        super().check_budget(budget, page_size)
        if budget < 2:
            name = type(self).__name__.lower()
            raise ValueError(f"budget={budget}: {name} needs at least 2 tokens (one held, one new)")

    def reserved(self, page_size: int) -> int:
        """One held token and the new one."""
        return 2

    def begin(self, budgets: Sequence[int], lengths: Sequence[int]) -> None:
        """Serve these rows."""
        super().begin(budgets, lengths)
        self._lengths = tuple(lengths)

    def select(self, view: View, q: Tensor) -> Selection:
        """The held tokens and the new one."""
        if view.layer not in self._slots:
            self._slots[view.layer] = self._first_slots(view)
        slots = self._slots[view.layer]
        slots.append(view.lengths_list)
        return slots.selection()

    def _first_slots(self, view: View) -> Slots:
        slots = Slots(self._lengths, self.lists(view.kv_heads), view.lengths.device)
        seen = self._context.get(view.layer)
        if seen:  # nothing where decoding began on an empty cache
            for row, length in enumerate(self._lengths):
                # Rows forked from one prefix share what it showed.
                found = seen[row if len(seen) > 1 else 0]
                slots.score[row, :, :length] = self.context_scores(found, length)
            self.evict(slots, [length - 1 for length in self._lengths])
        return slots

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

    def bytes_moved(self, shape: CacheShape, length: int, budget: int, read: float) -> float:
        """What is attended to, and the scores of its slots, read and written."""
        return super().bytes_moved(shape, length, budget, read) + 2 * self._scores(shape, read)

    def bytes_held(self, shape: CacheShape, length: int, budget: int) -> float:
        """The budget's tokens and their scores."""
        slots = min(length, budget)
        return slots * shape.token_bytes + self._scores(shape, slots)

    def _scores(self, shape: CacheShape, slots: float) -> float:
        return self.lists(shape.kv_heads) * slots * SCORE_BYTES
