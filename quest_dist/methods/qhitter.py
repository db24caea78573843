"""Q-Hitter (Zhang et al., MLSys 2024): heavy hitters that are also easy to quantise.

H2O over a cache in `bits` bits, which evicts by attention and by how well a token rounds. Of the
budget - 1 tokens that are held, `recent_share` are the newest, `attention_share` those of most
accumulated attention A, as in H2O, and the rest those of the highest

    c = w A' + (1 - w) (2 - eK' - eV') / 2,    w = attention_weight (the paper's lambda)

A' is A scaled to 0..1 over all heads of the layer, eK' and eV' the L2 rounding errors of the
token's key and value, scaled by the smallest and largest that the layer has seen: over the whole
context, then wider where a new token lies outside (the released code scales a new token over its
own heads alone, which says nothing of the token). The paper's shares of a prompt, .05 recent, .07
by attention and .08 by c, are a quarter, 35 and 40 % of what is held. `attention_weight` 1 is H2O
on the same quantiser, and 16 `bits` are H2O itself.

Every step attends to rounded keys and values, the new token's too; the prefill is exact. The
quantiser is that of quest_dist.methods.rounded_pages, simulated as in the paper's code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from quest_dist import ops
from quest_dist.methods.h2o import H2O
from quest_dist.methods.method import Selection, View, as_int32
from quest_dist.methods.rounded_pages import BITS, IDENTITY, RoundedPages, token_bytes
from quest_dist.methods.slots import Slots
from quest_dist.methods.traffic import CacheShape
from quest_dist.reference import Attended


@dataclass
class _Ease:
    """How well a layer's tokens round: 1 the best, fp32 [R, G, W] by position, and the smallest and
    largest error of keys and of values so far, each [R, 2]."""

    of: Tensor
    low: Tensor
    high: Tensor

    def take(self, row: int, start: int, errors: Tensor) -> None:
        """Take in the errors [2, G, new] of a row's tokens from `start` on."""
        if not errors.shape[2]:
            return
        flat = errors.flatten(1)
        self.low[row] = torch.minimum(self.low[row], flat.amin(1))
        self.high[row] = torch.maximum(self.high[row], flat.amax(1))
        scaled = _scaled(errors, self.low[row][:, None, None], self.high[row][:, None, None])
        end = start + errors.shape[2]
        if end > self.of.shape[2]:
            self.of = torch.nn.functional.pad(self.of, (0, 2 * end - self.of.shape[2]))
        self.of[row, :, start:end] = 1 - scaled.mean(0)


def _scaled(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """x from low..high to 0..1; 0 where there is no range."""
    return ((x - low) / (high - low)).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


@dataclass
class QHitter(H2O):
    """Settings: H2O's; `attention_share` of what is held that is chosen by attention alone,
    `attention_weight` of attention in the combined score, `bits` 1 to 8, or 16 for none.
    """

    attends: ClassVar[bool] = True

    recent_share: float = 0.25
    attention_share: float = 0.35
    attention_weight: float = 0.5
    bits: int = 4
    _pages: RoundedPages | None = field(default=None, init=False, repr=False)
    _ease: dict[int, _Ease] = field(default_factory=dict, init=False, repr=False)
    _layer: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        """Validate the settings."""
        super().__post_init__()
        for name in ("attention_share", "attention_weight"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}={getattr(self, name)}: choose a number from 0 to 1")
        if self.recent_share + self.attention_share > 1.0:
            raise ValueError(
                f"attention_share={self.attention_share}: with recent_share={self.recent_share} it"
                " is more than everything"
            )
        if self.bits not in BITS:
            choices = ", ".join(map(str, BITS))
            raise ValueError(f"bits={self.bits}: choose one of {choices}")

    @property
    def exact(self) -> bool:  # type: ignore[override]
        """Whether keys and values are what they were."""
        return self.bits == IDENTITY

    def begin(self, budgets: Sequence[int], lengths: Sequence[int]) -> None:
        """Serve these rows."""
        super().begin(budgets, lengths)
        self._pages = RoundedPages(self.bits, len(lengths), self.one_prefix)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with the rows named."""
        super().keep(rows)
        self._rounded.keep(rows)
        chosen = list(rows)
        for ease in self._ease.values():
            ease.of, ease.low, ease.high = (x[chosen] for x in (ease.of, ease.low, ease.high))

    @property
    def _rounded(self) -> RoundedPages:
        assert self._pages is not None, "begin comes first"
        return self._pages

    def select(self, view: View, q: Tensor) -> Selection:
        """The held tokens and the new one; what is new is rounded first."""
        self._layer = view.layer
        if view.layer not in self._ease:
            self._ease[view.layer] = self._first_ease(view)
            self._take(view, self._lengths)  # the context's range is the context's own
        self._take(view, view.lengths_list)
        return super().select(view, q)

    def _first_ease(self, view: View) -> _Ease:
        rows, device = len(view.lengths_list), view.lengths.device
        return _Ease(
            torch.zeros(rows, view.kv_heads, max(view.lengths_list), device=device),
            torch.full((rows, 2), torch.inf, device=device),
            torch.full((rows, 2), -torch.inf, device=device),
        )

    def _take(self, view: View, lengths: Sequence[int]) -> None:
        starts, errors = self._rounded.read(view, lengths)
        if self.attention_weight == 1.0:
            return  # nothing is ranked by them
        for row, (start, found) in enumerate(zip(starts, errors, strict=True)):
            self._ease[view.layer].take(row, start, found)

    def attend(self, view: View, q: Tensor, selection: Selection) -> Attended:
        """Attention over the rounded keys and values."""
        return super().attend(replace(view, kv=self._rounded.kv(view.layer)), q, selection)

    def evict(self, slots: Slots, newest: Sequence[int]) -> None:
        """The newest are protected, then those of most attention; the rest compete by c."""
        capacity = [budget - 1 for budget in self.budgets]
        if self.attention_weight == 1.0 or not slots.full(capacity):
            super().evict(slots, newest)
            return
        recent = [int(most * self.recent_share) for most in capacity]
        protected = [t - r + 1 for t, r in zip(newest, recent, strict=True)]
        by_attention = [int(most * self.attention_share) for most in capacity]
        slots.evict(capacity, protected, self._ranks(slots, protected, by_attention))

    def _ranks(self, slots: Slots, protected: Sequence[int], by_attention: Sequence[int]) -> Tensor:
        """c of every slot [R, G, W]; infinite for those of most attention."""
        device = slots.score.device
        used = as_int32(slots.used, device)
        empty = torch.arange(slots.width, device=device) >= used[:, None, None]
        low = slots.score.masked_fill(empty, torch.inf).amin((1, 2), keepdim=True)
        high = slots.score.masked_fill(empty, -torch.inf).amax((1, 2), keepdim=True)
        ease = self._ease[self._layer].of.gather(2, slots.position.clamp(min=0).long())
        share = self.attention_weight
        ranks = share * _scaled(slots.score, low, high) + (1 - share) * ease
        recent = slots.position >= as_int32(protected, device)[:, None, None]
        older = slots.score.masked_fill(recent, -torch.inf)
        first, _ = ops.select_top(older, used, as_int32(by_attention, device), force_last=False)
        # Unused places, of rows that choose fewer or evict nothing, go where nothing is read.
        first = torch.where(first < 0, slots.width, first).long()
        ranks = torch.nn.functional.pad(ranks, (0, 1))
        return ranks.scatter(2, first, torch.inf)[:, :, :-1].contiguous()

    def bytes_moved(self, shape: CacheShape, length: int, budget: int, read: float) -> float:
        """What is attended to, packed; its scores, read and written; how well it rounds, read."""
        return read * token_bytes(shape, self.bits) + (2 + self._kinds) * self._scores(shape, read)

    def bytes_held(self, shape: CacheShape, length: int, budget: int) -> float:
        """The budget's tokens, packed, and what is kept of each to choose by."""
        slots = min(length, budget)
        packed = slots * token_bytes(shape, self.bits)
        return packed + (1 + self._kinds) * self._scores(shape, slots)

    @property
    def _kinds(self) -> int:
        return 0 if self.attention_weight == 1.0 else 1
