"""Clusters of a context's keys, and how much attention a query would give to each by centroid.

Keys are clustered by direction: k-means (scikit-learn's, k-means++ start, seed 0) over the keys at
length 1; a centroid is the mean of the keys as they are. The score of cluster i for a query q,

    S_i = exp(scale q . C_i) / sum_j N_j exp(scale q . C_j),

is what each of its N_i tokens would draw if it were the centroid: sum_i N_i S_i = 1. It is computed
by logarithms, so that no logit is too large, and averaged over the query heads of a kv head.

Invariants: the same keys give the same clusters, whatever the number of threads; an empty cluster
has size 0, weighs nothing and scores 0.

Shape letters: n queries, H query heads, G kv heads, D head dim, L tokens, K clusters.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

#: How often k-means moves its centroids at most.
ITERATIONS = 10


@dataclass(frozen=True)
class Clusters:
    """Clusters of each kv head: `label` int64 [G, L] of its tokens, `centroid` fp32 [G, K, D],
    `size` fp32 [G, K]."""

    label: Tensor
    centroid: Tensor
    size: Tensor

    def scores(self, q: Tensor, scale: float, open: Tensor | None = None) -> Tensor:
        """S of every cluster for queries q [n, H, D], group means: fp32 [n, G, K].

        Clusters outside `open` bool [n, G, K] are left out of the sum and score 0.
        """
        queries, heads, dim = q.shape
        kv_heads, count = self.size.shape
        groups = q.float().view(queries, kv_heads, heads // kv_heads, dim).transpose(0, 1)
        logit = groups.reshape(kv_heads, -1, dim) @ self.centroid.mT * scale
        logit = logit.view(kv_heads, queries, -1, count).transpose(0, 1)  # [n, G, g, K]
        there = self.size > 0
        there = there.expand(queries, -1, -1) if open is None else there & open
        weighed = logit + self.size.clamp(min=1.0).log()[:, None]
        total = weighed.masked_fill(~there[:, :, None], -torch.inf).logsumexp(-1, keepdim=True)
        score = (logit - total).exp().mean(2)
        return score.masked_fill(~there, 0.0)


def clustered(keys: Tensor, count: int) -> Clusters:
    """`count` clusters a kv head of keys [G, L, D], on their device; k-means itself runs on the
    CPU, on one thread (its sums would depend on their number)."""
    from threadpoolctl import threadpool_limits

    raw = keys.detach().float()
    unit = torch.nn.functional.normalize(raw, dim=-1).cpu()
    with threadpool_limits(limits=1):
        labels = torch.stack([_labels(head, count) for head in unit])
    return grouped(raw, labels.to(keys.device), count)


def grouped(keys: Tensor, label: Tensor, count: int) -> Clusters:
    """The clusters that labels [G, L] in 0..count - 1 make of keys [G, L, D]."""
    kv_heads, _, dim = keys.shape
    keys = keys.float()
    size = keys.new_zeros(kv_heads, count)
    size.scatter_add_(1, label, torch.ones_like(label, dtype=torch.float32))
    sums = keys.new_zeros(kv_heads, count, dim)
    sums.scatter_add_(1, label[:, :, None].expand(-1, -1, dim), keys)
    return Clusters(label, sums / size.clamp(min=1.0)[:, :, None], size)


def _labels(unit: Tensor, count: int) -> Tensor:
    """The cluster of each of the vectors [L, D]."""
    from sklearn.cluster import KMeans, kmeans_plusplus
    from sklearn.exceptions import ConvergenceWarning

    points = unit.numpy()
    # One candidate a centroid, as published; the library's default, seven, takes 4 times as long.
    start, _ = kmeans_plusplus(points, count, random_state=0, n_local_trials=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct keys than clusters
        found = KMeans(count, init=start, n_init=1, max_iter=ITERATIONS, random_state=0).fit(points)
    return torch.from_numpy(found.labels_).long()
