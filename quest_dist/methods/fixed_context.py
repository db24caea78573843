"""A fixed context in clusters: which of its tokens a query is to attend to, in all layers.

The context is a prefilled prefix less its last tokens, the *window*, whose queries calibrate: one
threshold for all layers and heads is such that their queries keep so many tokens on average. It is
exact (what bisection would end at): the scores of all clusters for all these queries are sorted
once, and every average asked for is looked up.

With coarse clusters (groups of fine ones, by k-means over their centroids) a query first drops
coarse ones, by a threshold of their own under which half of what has to go is dropped, and scores
the fine ones of the rest.

Shape letters: n queries, H query heads, G kv heads, D head dim, L tokens, K clusters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quest_dist.methods.clusters import Clusters, clustered, grouped


@dataclass(frozen=True)
class Prefilled:
    """What was seen of one layer's prefill: the last queries [n, H, D], all keys [G, L, D]."""

    queries: Tensor
    keys: Tensor
    scale: float


@dataclass(frozen=True)
class Layer:
    """One layer's clusters; `parent` int64 [G, K] is the coarse cluster of a fine one."""

    fine: Clusters
    coarse: Clusters | None
    parent: Tensor | None

    @classmethod
    def of(cls, keys: Tensor, share: float, coarse_share: float | None) -> Layer:
        """Clusters of keys [G, L, D]: as many as the shares of L say, at least one."""
        length = keys.shape[1]
        fine = clustered(keys, count_of(length, share))
        if coarse_share is None:
            return cls(fine, None, None)
        groups = count_of(length, coarse_share)
        parent = clustered(fine.centroid, groups).label
        return cls(fine, grouped(keys, parent.gather(1, fine.label), groups), parent)

    def scores(self, q: Tensor, scale: float, coarse_threshold: float | None) -> Tensor:
        """Scores of the fine clusters for q [n, H, D]: [n, G, K], 0 below a dropped coarse one."""
        if self.coarse is None or self.parent is None or coarse_threshold is None:
            return self.fine.scores(q, scale)
        kept = self.coarse.scores(q, scale) > coarse_threshold
        opened = kept.gather(2, self.parent.expand(q.shape[0], -1, -1))
        return self.fine.scores(q, scale, opened)


def count_of(length: int, share: float) -> int:
    """Clusters of `length` tokens."""
    return max(1, int(length * share))


class Calibration:
    """Scores of all clusters for the calibrating queries, best first, with what keeping down to
    each of them would keep: mean tokens a list."""

    def __init__(self, scores: list[Tensor], sizes: list[Tensor]) -> None:
        """`scores` [n, G, K] and `sizes` [G, K] a layer."""
        lists = sum(part.shape[0] * part.shape[1] for part in scores)
        flat = torch.cat([part.flatten() for part in scores])
        tokens = torch.cat(
            [size.expand_as(part).flatten() for part, size in zip(scores, sizes, strict=True)]
        )
        self._score, order = flat.sort(descending=True, stable=True)
        self._kept = tokens[order].double().cumsum(0) / lists

    def threshold(self, tokens: float) -> float:
        """Keeping what scores above it keeps at most `tokens` a list on average, and with the next
        cluster more; negative: everything is kept. For no tokens, nothing scores above it."""
        if tokens <= 0:
            return math.inf
        place = int(torch.searchsorted(self._kept, tokens, right=True))
        return float(self._score[place]) if place < len(self._score) else -1.0

    def kept(self, threshold: float) -> float:
        """Mean tokens a list that score above a threshold."""
        above = int((self._score > threshold).sum())
        return float(self._kept[above - 1]) if above else 0.0


class FixedContext:
    """The clusters of one prefix less a window of its last `window` tokens, in all layers seen."""

    def __init__(
        self,
        seen: Mapping[int, Prefilled],
        window: int,
        share: float,
        coarse_share: float | None,
    ) -> None:
        first = next(iter(seen.values()))
        self.tokens = first.keys.shape[1] - window
        self.layers = {
            layer: Layer.of(part.keys[:, : self.tokens], share, coarse_share)
            for layer, part in seen.items()
        }
        self._queries = {
            layer: (part.queries[-window:].clone(), part.scale) for layer, part in seen.items()
        }
        self._flat: Calibration | None = None

    def calibrate(self, tokens: float) -> tuple[float | None, Calibration]:
        """The coarse threshold where there are coarse clusters, and the fine ones' calibration
        under it, for lists that keep `tokens` on average."""
        coarse: float | None = None
        if any(layer.coarse is not None for layer in self.layers.values()):
            coarse = self._coarse().threshold((self.tokens + tokens) / 2)
            return coarse, self._fine(coarse)
        if self._flat is None:
            self._flat = self._fine(None)
        return None, self._flat

    def _coarse(self) -> Calibration:
        scores, sizes = [], []
        for number, layer in self.layers.items():
            assert layer.coarse is not None
            scores.append(layer.coarse.scores(*self._queries[number]))
            sizes.append(layer.coarse.size)
        return Calibration(scores, sizes)

    def _fine(self, coarse_threshold: float | None) -> Calibration:
        scores = [
            layer.scores(*self._queries[number], coarse_threshold)
            for number, layer in self.layers.items()
        ]
        return Calibration(scores, [layer.fine.size for layer in self.layers.values()])

    def kept(
        self, layer: int, q: Tensor, scale: float, coarse: float | None, threshold: float
    ) -> Tensor:
        """Which of the tokens a query of one row, q [H, D], keeps: bool [G, tokens]."""
        clusters = self.layers[layer]
        above = clusters.scores(q[None], scale, coarse)[0] > threshold
        return above.gather(1, clusters.fine.label)
