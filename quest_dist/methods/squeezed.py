"""Squeezed Attention (Hooper et al., arXiv 2411.09688): query-aware selection of key clusters.

The prefilled prefix is the fixed context. Its keys are clustered once, a kv head and layer (shared
by all rows that continue it); its last tokens are the observation window. A step scores clusters by
their centroids (quest_dist.methods.clusters), keeps the tokens of those above one threshold for all
layers and heads, and attends exactly to them, the window, and every token decoded since.

The threshold is calibrated on the window's queries, per context and budget: the window, what was
decoded and the mean of what is kept are the budget together. Only the mean is controlled: heads and
layers take what they need. As tokens are decoded the threshold rises; once window and decoded
tokens are more than the budget, nothing else is kept and they are attended to all the same.

A window of `window` tokens would not fit small budgets: it is at most half of the budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from quest_dist.methods.fixed_context import Calibration, FixedContext, Prefilled, count_of
from quest_dist.methods.method import EVERYTHING, Method, Selection, View, as_int32
from quest_dist.methods.traffic import CacheShape

LABEL_BYTES = 4  # which cluster a token is in


@dataclass(frozen=True)
class _Row:
    """A row's context in clusters, and its thresholds."""

    context: FixedContext
    coarse: float | None
    calibration: Calibration


@dataclass
class Squeezed(Method):
    """Settings: `clusters` per token of the context (paper: 0.05); `coarse_clusters` per token, or
    null for one level (paper: 0.01 above 0.05); `window` last tokens of the prefix always kept.
    """

    own_schedule: ClassVar[bool] = True
    needs_prefill: ClassVar[bool] = True
    waits: ClassVar[bool] = True
    cuts_once: ClassVar[bool] = True

    clusters: float = 0.05
    coarse_clusters: float | None = None
    window: int = 100
    _seen: dict[int, list[Prefilled]] = field(default_factory=dict, init=False, repr=False)
    _prefixes: tuple[int, ...] = field(default=(), init=False, repr=False)
    _contexts: dict[tuple[int, int], FixedContext] = field(
        default_factory=dict, init=False, repr=False
    )
    _rows: list[_Row | None] = field(default_factory=list, init=False, repr=False)
    _places: list[int] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        """Validate the settings."""
        if not 0.0 < self.clusters <= 1.0:
            raise ValueError(f"clusters={self.clusters}: choose a number above 0, up to 1")
        coarse = self.coarse_clusters
        if coarse is not None and not 0.0 < coarse <= self.clusters:
            raise ValueError(
                f"coarse_clusters={coarse}: choose a number above 0, up to"
                f" clusters={self.clusters}, or null for one level"
            )
        if self.window < 1:
            raise ValueError(
                f"window={self.window}: its queries calibrate; choose 1 or more tokens"
            )

    def check_budget(self, budget: int, page_size: int) -> None:
        """One token of the window beside the new one, at least."""
        super().check_budget(budget, page_size)
        if budget < 2:
            raise ValueError(f"budget={budget}: squeezed needs at least 2 tokens (window and new)")

    def observe_prefill(self, layer: int, row: int, q: Tensor, k: Tensor, scale: float) -> None:
        """Keep the last queries and all keys of the prefix; what is prefilled later is no part of
        it."""
        if self.budgets:
            return
        queries = q[0].detach().transpose(0, 1)
        rows = self._seen.setdefault(layer, [])
        if row < len(rows) and len(queries) < self.window:
            queries = torch.cat([rows[row].queries, queries])
        rows[row : row + 1] = [Prefilled(queries[-self.window :], k[0].detach(), scale)]

    def begin(self, budgets: Sequence[int], lengths: Sequence[int]) -> None:
        """Serve these rows; the contexts of those that begin sparse are clustered now."""
        super().begin(budgets, lengths)
        self._prefixes = tuple(lengths)
        shared = all(len(rows) == 1 for rows in self._seen.values())
        self._places = [0 if shared else row for row in range(len(lengths))]
        self._rows = [None] * len(lengths)
        for row, length in enumerate(lengths):
            if self.budgets[row] <= length:
                self._row(row)

    def _window(self, budget: int) -> int:
        return min(self.window, budget // 2)

    def _row(self, row: int) -> _Row | None:
        """A row's clusters and thresholds; None where its prefix is not longer than the window."""
        found, window = self._rows[row], self._window(self.budgets[row])
        if found is not None or not self._seen or self._prefixes[row] <= window:
            return found
        key = self._places[row], window
        if key not in self._contexts:
            seen = {layer: rows[key[0]] for layer, rows in self._seen.items()}
            self._contexts[key] = FixedContext(seen, window, self.clusters, self.coarse_clusters)
        context = self._contexts[key]
        found = _Row(context, *context.calibrate(self.budgets[row] - window - 1))
        self._rows[row] = found
        if None not in self._rows:
            self._seen.clear()  # keys are in the cache; only clustering needs them all at once
        return found

    def _threshold(self, row: int, found: _Row, length: int) -> float:
        always = length - found.context.tokens
        return found.calibration.threshold(max(0, self.budgets[row] - always))

    def select(self, view: View, q: Tensor) -> Selection:
        """Tokens of the clusters above the threshold, the window and what was decoded."""
        kept = [self._kept(row, view, q[row]) for row in range(len(view.lengths_list))]
        if all(mask is None for mask in kept):
            return EVERYTHING
        longest = max(view.lengths_list)
        listed = torch.zeros(len(kept), view.kv_heads, longest, dtype=torch.bool, device=q.device)
        for row, mask in enumerate(kept):
            if mask is not None:
                listed[row, :, : view.lengths_list[row]] = True
                listed[row, :, : mask.shape[1]] = mask
        index, count = lists_of(listed)
        whole = as_int32([mask is None for mask in kept], q.device).bool()
        return Selection(index, count.masked_fill(whole[:, None], -1), "tokens")

    def _kept(self, row: int, view: View, q: Tensor) -> Tensor | None:
        """Which clustered tokens a row keeps; None: all that it has."""
        length = view.lengths_list[row]
        if self.budgets[row] >= length:
            return None
        found = self._row(row)
        if found is None:
            return None
        threshold = self._threshold(row, found, length)
        return found.context.kept(view.layer, q, view.scale, found.coarse, threshold)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with the rows named."""
        super().keep(rows)
        self._prefixes = tuple(self._prefixes[row] for row in rows)
        self._places = [self._places[row] for row in rows]
        self._rows = [self._rows[row] for row in rows]

    def planned(self, length: int, budget: int, page_size: int, step: int) -> tuple[int, int]:
        """At least the window and what was decoded. At most as many more as can score above the
        threshold (scores of all tokens add up to 1), where the rows share a context."""
        if budget >= length:
            return length, length
        low = min(length, self._window(budget) + step + 1)
        if len(set(self._places)) != 1 or budget not in self.budgets:
            return low, length
        row = self.budgets.index(budget)
        found = self._row(row)
        if found is None:
            return length, length
        threshold = self._threshold(row, found, length)
        # Scores are rounded: a hundred thousandth more may pass.
        most = int(1.00001 / threshold) if threshold > 0 else length
        return low, length - found.context.tokens + min(found.context.tokens, most)

    def bytes_moved(self, shape: CacheShape, length: int, budget: int, read: float) -> float:
        """Centroids (keys only), where clusters are chosen, and what was read."""
        moved = super().bytes_moved(shape, length, budget, read)
        if budget >= length:
            return moved
        tokens = self._clustered(length, budget)
        centroids = float(count_of(tokens, self.clusters))
        if self.coarse_clusters is not None:
            # Half of what has to go goes by coarse clusters; the fine ones of the rest are read.
            kept = max(0, budget - (length - tokens))
            centroids *= (tokens + kept) / (2 * tokens)
            centroids += count_of(tokens, self.coarse_clusters)
        return moved + centroids * shape.vector_bytes

    def bytes_held(self, shape: CacheShape, length: int, budget: int) -> float:
        """All tokens; centroids, and the cluster of each token in each kv head."""
        tokens = self._clustered(length, budget)
        centroids = count_of(tokens, self.clusters)
        if self.coarse_clusters is not None:
            centroids += count_of(tokens, self.coarse_clusters)
        labels = tokens * shape.kv_heads * LABEL_BYTES
        return super().bytes_held(shape, length, budget) + centroids * shape.vector_bytes + labels

    def _clustered(self, length: int, budget: int) -> int:
        """Tokens in clusters; before there are rows, as if `length` were the first step's."""
        prefix = min(length - 1, max(self._prefixes, default=length))
        return max(1, prefix - self._window(budget))


def lists_of(listed: Tensor) -> tuple[Tensor, Tensor]:
    """Positions where bool [R, G, L] holds, ascending, as ops take lists: index int32 [R, G, K], -1
    where unused, and count int32 [R, G]."""
    count = listed.sum(-1)
    place = listed.nonzero()
    index = torch.full(
        (*count.shape, int(count.max())), -1, dtype=torch.int32, device=listed.device
    )
    slot = listed.cumsum(-1)[listed] - 1
    index[place[:, 0], place[:, 1], slot] = place[:, 2].int()
    return index, count.int()
