"""StreamingLLM (Xiao et al., arXiv 2309.17453): attention sinks and a sliding window.

A step attends to the first `sinks` tokens and the last budget - sinks ones, the new token included
(s + R + 1 = budget). `positions=original` keeps the rotary positions of the text. `rolling` numbers
the kept tokens 0, 1, ... as the paper does: within the window nothing changes (rotary attention
sees differences only), so it is enough to score the sinks with the query turned back by the
distance that rolling closes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from quest_dist.methods.method import (
    EVERYTHING,
    Method,
    Selection,
    View,
    as_int32,
    check_choice,
)
from quest_dist.methods.traffic import CacheShape

POSITIONS = ("original", "rolling")


@dataclass
class Streaming(Method):
    """Settings: `sinks` first tokens always attended (paper: 4), `positions` original | rolling."""

    sinks: int = 4
    positions: str = "original"
    _selected: tuple[int, tuple[int, ...], Selection] = field(
        default=(-1, (), EVERYTHING), init=False, repr=False
    )

    def __post_init__(self) -> None:
        """Validate the settings."""
        check_choice("positions", self.positions, POSITIONS)
        if self.sinks < 0:
            raise ValueError(f"sinks={self.sinks}: choose 0 or more tokens")

    def check_budget(self, budget: int, page_size: int) -> None:
        """The sinks and the new token must fit."""
        super().check_budget(budget, page_size)
        if budget < self.sinks + 1:
            raise ValueError(
                f"budget={budget}: streaming with sinks={self.sinks} needs at least "
                f"{self.sinks + 1} tokens"
            )

    def reserved(self, page_size: int) -> int:
        """The sinks and the new token."""
        return self.sinks + 1

    def select(self, view: View, q: Tensor) -> Selection:
        """Sinks and window, the same in every layer of a step that has the same budgets."""
        if self._selected[:2] != (view.step, self.budgets):
            found = self._sinks_and_window(view.lengths_list, q.device)
            self._selected = view.step, self.budgets, found
        selection = self._selected[2]
        if self.positions == "original" or selection.index is None or self.sinks == 0:
            return selection
        closed = [max(0, n - b) for n, b in zip(view.lengths_list, self.budgets, strict=True)]
        turned = view.rotate(q, -as_int32(closed, q.device))
        return Selection(selection.index, selection.count, "tokens", turned, self.sinks)

    def _sinks_and_window(self, lengths: tuple[int, ...], device: torch.device) -> Selection:
        rows = list(zip(lengths, self.budgets, strict=True))
        if all(budget >= length for length, budget in rows):
            return EVERYTHING
        # A row that still holds everything lists it, so that its first `sinks` entries are sinks.
        counts = as_int32([min(length, budget) for length, budget in rows], device)
        longest = max(min(length, budget) for length, budget in rows)
        slots = torch.arange(longest, dtype=torch.int32, device=device)
        index = torch.stack(
            [torch.where(slots < self.sinks, slots, slots + max(0, n - b)) for n, b in rows]
        )
        index = index.masked_fill(slots >= counts[:, None], -1)
        return Selection(index[:, None].contiguous(), counts[:, None].contiguous(), "tokens")

    def stateless(self) -> bool:
        """Nothing is kept between steps."""
        return True

    def planned(self, length: int, budget: int, page_size: int, step: int) -> tuple[int, int]:
        """The budget, or all tokens while they are fewer."""
        tokens = min(length, budget)
        return tokens, tokens

    def bytes_held(self, shape: CacheShape, length: int, budget: int) -> float:
        """Sinks and window."""
        return min(length, budget) * shape.token_bytes
