"""The tokens that an evicting method still holds: positions and scores, per row and list.

Invariants: positions are ascending, so that reading order never depends on what was evicted before;
an evicted position never returns; all lists of a row hold equally many tokens. Scores are fp32:
sums over thousands of queries would not survive in bf16 (its spacing at 8192 is 64).

Shape letters: R rows, K lists a row (1 for TOVA, G kv heads for H2O), W slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quest_dist import ops
from quest_dist.methods.method import Selection, as_int32


class Slots:
    """Slots of one layer; they begin with all tokens of each row's context, at score 0."""

    def __init__(self, lengths: Sequence[int], lists: int, device: torch.device) -> None:
        rows, width = len(lengths), max(lengths)
        self.used = list(lengths)
        self._seen = list(lengths)
        order = torch.arange(width, dtype=torch.int32, device=device)
        self.position = order.expand(rows, lists, width).contiguous()
        self.score = torch.zeros(rows, lists, width, device=device)

    def _ints(self, values: Sequence[int]) -> Tensor:
        return as_int32(values, self.position.device)

    @property
    def width(self) -> int:
        """Slots that the tensors have room for, W."""
        return int(self.position.shape[2])

    def append(self, lengths: Sequence[int]) -> None:
        """Hold the tokens that each row has gained up to `lengths[r]`, at score 0: the new one of a
        decode step."""
        new = max(length - seen for length, seen in zip(lengths, self._seen, strict=True))
        room = max(self.used) + new - self.width
        if room > 0:
            self.position = torch.nn.functional.pad(self.position, (0, room), value=-1)
            self.score = torch.nn.functional.pad(self.score, (0, room))
        rows = torch.arange(len(self.used), device=self.position.device)
        for _ in range(new):
            slot = self._ints(self.used)
            self.position[rows, :, slot] = self._ints(self._seen)[:, None]
            self.score[rows, :, slot] = 0.0
            self.used = [used + 1 for used in self.used]
            self._seen = [seen + 1 for seen in self._seen]

    def selection(self) -> Selection:
        """All held tokens."""
        count = self._ints(self.used)[:, None].expand(-1, self.position.shape[1]).contiguous()
        return Selection(self.position, count, "tokens")

    def full(self, capacity: Sequence[int]) -> bool:
        """Whether a row holds more than `capacity[r]` tokens."""
        return any(used > most for used, most in zip(self.used, capacity, strict=True))

    def evict(
        self, capacity: Sequence[int], protected: Sequence[int], ranks: Tensor | None = None
    ) -> None:
        """Hold at most `capacity[r]` tokens a list: those of highest score, ties to the newer, or
        of highest rank [R, K, W] where given.

        Positions at or after `protected[r]` are never evicted.
        """
        if not self.full(capacity):
            return
        score = (self.score if ranks is None else ranks).masked_fill(
            self.position >= self._ints(protected)[:, None, None], torch.inf
        )
        keep = [min(used, most) for used, most in zip(self.used, capacity, strict=True)]
        slot, _ = ops.select_top(score, self._ints(self.used), self._ints(keep), force_last=False)
        slot = self._with_full_rows(slot, keep)
        self.position = self.position.gather(2, slot)
        self.score = self.score.gather(2, slot)
        self.used = keep

    def _with_full_rows(self, slot: Tensor, keep: Sequence[int]) -> Tensor:
        """Slot lists wide enough for all rows; rows that evict nothing (count -1) list their slots
        in order."""
        width = max(keep)
        order = torch.arange(width, device=slot.device)
        slot = torch.nn.functional.pad(
            slot[:, :, :width], (0, max(0, width - slot.shape[2])), value=-1
        )
        whole = self._ints(keep) == self._ints(self.used)
        return torch.where(whole[:, None, None], order, slot.clamp(min=0).long())

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with the rows named."""
        self.used = [self.used[row] for row in rows]
        self._seen = [self._seen[row] for row in rows]
        self.position = self.position[list(rows)].contiguous()
        self.score = self.score[list(rows)].contiguous()
