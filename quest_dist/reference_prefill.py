"""Reference of the ops over a whole prompt, as `reference` is of those over pages.

Shape letters: R rows, H query heads, G kv heads, D head dimension, L tokens, n queries.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quest_dist.reference import accumulator


def prefill_attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Causal attention of the last n of L positions: q [R, H, n, D], k, v [R, G, L, D] ->

    [R, n, H, D]. Query i stands at position L - n + i and attends to the positions up to its own.
    """
    group = q.shape[1] // k.shape[1]
    queries, length, exact = q.shape[2], k.shape[2], accumulator(q.dtype)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    future = torch.ones(queries, length, dtype=torch.bool).triu(length - queries + 1)
    out = torch.empty(q.shape[0], queries, q.shape[1], q.shape[3], dtype=q.dtype)
    for h in range(q.shape[1]):
        score = (q[:, h].to(exact) @ k[:, h // group].to(exact).mT) * scale
        p = score.masked_fill(future, -math.inf).softmax(-1)
        out[:, :, h] = (p @ v[:, h // group].to(exact)).to(q.dtype)
    return out


def column_sums(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """Attention mass of each key under the causal softmax of the last n queries: [R, H, L].

    c_t = sum_i p_it with p as in `prefill_attend`; computed for blocks of queries, head by head.
    """
    group = q.shape[1] // k.shape[1]
    queries, length, exact = q.shape[2], k.shape[2], accumulator(q.dtype)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    sums = torch.zeros(q.shape[0], q.shape[1], length, dtype=exact, device=q.device)
    positions = torch.arange(length, device=q.device)
    for first in range(0, queries, 128):
        last = min(first + 128, queries)
        seen = length - queries + last  # no query of the block looks further
        own = positions[length - queries + first : seen]
        future = positions[None, :seen] > own[:, None]
        for h in range(q.shape[1]):
            score = (q[:, h, first:last].to(exact) @ k[:, h // group, :seen].to(exact).mT) * scale
            sums[:, h, :seen] += score.masked_fill_(future, -math.inf).softmax(-1).sum(dim=1)
    return sums
