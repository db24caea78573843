"""Predictors of DejaVu: a small network a layer that tells from the layer's queries which heads'
outputs will be large.

Input are the queries of all heads, turned back to position 0, each channel standardised; output the
logarithm of every head's output norm, relative to the head's mean. A hidden layer of ReLU, trained
by Adam on squared error, from a fixed seed. One predictor serves every number of heads, as it
ranks them (DejaVu's own classify, for one sparsity).

The last sequence is held out of the training. On it, `recall` [layers, H] is the share of the
oracle's n heads that the predictor finds, for n = 1 to H, and `static` the same for the n heads
that are largest on average: what could be had without looking at the token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quest_dist import ops
from quest_dist.attention import PagedCache, Patch, patch
from quest_dist.methods.dejavu import features, predicted_norms

if TYPE_CHECKING:
    from quest_dist.models import LoadedModel

VERSION = 1
SETTINGS: tuple[str, ...] = ()
SEQUENCES = 9
LENGTH = 1024
#: Tokens at the start of a sequence that have too little before them to be like a decode step; at
#: most a quarter of it.
SKIPPED = 64
HIDDEN = 64
STEPS = 150
BATCH = 512
RATE = 4e-3
SMALLEST = 1e-6  # a norm that a logarithm can bear


class _Watched:
    """Dense prefills, of whose queries and head outputs all layers are kept: a cache's `batch`."""

    def __init__(self, patched: Patch) -> None:
        self._rotate = patched.rotate
        self.queries: dict[int, list[Tensor]] = {}
        self.norms: dict[int, list[Tensor]] = {}

    def write(self, layer: int, k: Tensor, v: Tensor, padding: Sequence[int] | None) -> None:
        """Nothing: a sequence is one forward pass."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Dense causal attention of q [1, H, n, D] -> [1, n, H, D]."""
        out = ops.prefill_attend(q, k, v, scale)
        positions = torch.arange(q.shape[2], device=q.device)
        back = self._rotate(q[0].transpose(0, 1), -positions)
        first = min(SKIPPED, len(back) // 4)
        self.queries.setdefault(layer, []).append(back[first:])
        self.norms.setdefault(layer, []).append(out[0, first:].float().norm(dim=-1))
        return out

    def count(self) -> None:
        """Nothing is decoded."""


def make(loaded: LoadedModel, tokens: Tensor, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """Train on all but the last sequence of tokens [SEQUENCES, LENGTH]."""
    watched = _watch(loaded, tokens)
    layers = [
        _trained(watched.queries.pop(layer), watched.norms.pop(layer), seed=layer)
        for layer in sorted(watched.queries)
    ]
    return {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}


@torch.no_grad()
def _watch(loaded: LoadedModel, tokens: Tensor) -> _Watched:
    with patch(loaded.model, lambda rows: [], page_size=16) as patched:
        watched = _Watched(patched)
        for sequence in tokens:
            cache = PagedCache(watched)
            loaded.model(input_ids=sequence[None], past_key_values=cache, logits_to_keep=1)
    return watched


def _trained(queries: Sequence[Tensor], norms: Sequence[Tensor], seed: int) -> dict[str, Tensor]:
    """A layer's predictor, and what it finds in the last sequence."""
    x = features(torch.cat(tuple(queries[:-1])))
    y = torch.cat(tuple(norms[:-1])).clamp(min=SMALLEST).log()
    draw = torch.Generator().manual_seed(seed)
    inputs, heads = x.shape[1], y.shape[1]
    weights = {
        "mean": x.mean(0),
        "scale": x.std(0).clamp(min=SMALLEST),
        "w1": torch.randn(inputs, HIDDEN, generator=draw).to(x.device) * (2 / inputs) ** 0.5,
        "b1": torch.zeros(HIDDEN, device=x.device),
        "w2": torch.zeros(HIDDEN, heads, device=x.device),
        "b2": torch.zeros(heads, device=x.device),
        "norm_mean": y.mean(0),
        "norm_scale": (y - y.mean(0)).std().clamp(min=SMALLEST)[None],
    }
    learnt = [weights[name].requires_grad_() for name in ("w1", "b1", "w2", "b2")]
    adam = torch.optim.Adam(learnt, lr=RATE)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(adam, STEPS)
    for _ in range(STEPS):
        part = torch.randint(len(x), (BATCH,), generator=draw).to(x.device)
        found = predicted_norms(x[part], {k: w[None] for k, w in weights.items()}, 0)
        loss = (found - y[part]).square().mean() / weights["norm_scale"].square()
        adam.zero_grad()
        loss.sum().backward()
        adam.step()
        decay.step()
    weights = {name: weight.detach() for name, weight in weights.items()}
    with torch.no_grad():
        found = predicted_norms(features(queries[-1]), {k: w[None] for k, w in weights.items()}, 0)
        same = weights["norm_mean"].expand_as(found)
        recalls = {"recall": _recall(found, norms[-1]), "static": _recall(same, norms[-1])}
    return weights | recalls


def _recall(found: Tensor, true: Tensor) -> Tensor:
    """Of the n largest of `true` [tokens, H], the share among the n largest of `found`; n to H."""
    ranks = [x.argsort(1, descending=True).argsort(1) for x in (found, true)]
    sizes = torch.arange(1, true.shape[1] + 1, device=true.device)
    both = (ranks[0][..., None] < sizes) & (ranks[1][..., None] < sizes)
    return both.sum(1).float().mean(0) / sizes
