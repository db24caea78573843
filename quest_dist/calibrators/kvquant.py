"""What KVQuant needs of a model: bounds of its keys by channel, and centroids for 2, 3 and 4 bits.

Keys are taken before their rotation and values as they are, from SEQUENCES x LENGTH tokens of the
text, less the first `sinks` of each sequence. Bounds are quantiles of a channel's keys, beyond
which a share `outliers` of them lies. Centroids are those of k-means over all numbers of a layer
that are no outliers, normalised to [-1, 1], each weighed by the square of the loss's gradient with
respect to it (the diagonal of the Fisher information; one backward pass a sequence).

k-means sees BINS means of neighbouring numbers instead of millions of numbers; a centroid moves by
less than the width of a bin, 2 / BINS. The paper reads 16 x 2048 tokens of WikiText-2; this is an
eighth of that, so that a model of 135M parameters takes half a minute on one core.

Tensors, of N layers: `lower`, `upper` [N, G, D]; for b = 2, 3, 4 and x = k, v the centroids `xb`
[N, 2^b], ascending, and `xb_qnorm`, moved so that numbers keep their mean and deviation (Q-Norm).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn.functional import cross_entropy

from quest_dist.attention_inputs import seen, turned
from quest_dist.methods.kvquant_blocks import value_bounds
from quest_dist.nuq import BITS

if TYPE_CHECKING:
    from quest_dist.models import LoadedModel

VERSION = 1
SETTINGS = ("outliers", "sinks")
SEQUENCES = 8
LENGTH = 512
BINS = 2048
STARTS = 4
"""How often k-means begins anew; the best of them is kept."""


def make(loaded: LoadedModel, tokens: Tensor, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """The artefact's tensors, from tokens int64 [sequences, length]."""
    numbers = [_observed(loaded, row[None], int(settings["sinks"])) for row in tokens]
    share = float(settings["outliers"])
    made: dict[str, list[Tensor]] = {}
    for layer in range(len(numbers[0])):
        k, k_weight, v, v_weight = (
            torch.cat([sequence[layer][part] for sequence in numbers]).float() for part in range(4)
        )
        lower, upper = key_bounds(k, share)
        found = {"lower": lower, "upper": upper}
        least, most, _ = value_bounds(v.flatten(1), share)
        for name, kept in (
            ("k", _kept(k.flatten(1), lower.flatten(), upper.flatten(), k_weight)),
            ("v", _kept(v.flatten(1), least, most, v_weight)),
        ):
            found |= {name + rest: tensor for rest, tensor in _fitted(*kept).items()}
        for name, tensor in found.items():
            made.setdefault(name, []).append(tensor.float())
    return {name: torch.stack(layers) for name, layers in made.items()}


def key_bounds(k: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Of keys [n, G, D] the bounds, [G, D] each, that leave out share / 2 of a channel on either
    side; a head at a time, as quantiles of many numbers at once are refused."""
    ends = torch.tensor([share / 2, 1 - share / 2], dtype=k.dtype, device=k.device)
    heads = [torch.quantile(head, ends, dim=0) for head in k.unbind(1)]
    lower, upper = torch.stack(heads, 1)
    return lower, upper


def centroids(x: Tensor, weights: Tensor, bits: int) -> Tensor:
    """The 2^bits centroids, ascending, of weighted k-means over numbers [n]."""
    count = 1 << bits
    present = weights > 0
    x, weights = x[present], weights[present]
    distinct = torch.unique(x)
    if len(distinct) <= count:  # every number is a centroid
        last = distinct[-1:] if len(distinct) else x.new_zeros(1)
        return torch.cat([distinct, last.expand(count - len(distinct))])
    means = KMeans(n_clusters=count, n_init=STARTS, random_state=0)
    numbers, mass = x[:, None].double().cpu().numpy(), weights.double().cpu().numpy()
    # Its threads are OpenMP's own, as many as there are cores, and spin while other work runs.
    with threadpool_limits(limits=1):
        means.fit(numbers, sample_weight=mass)
    found = torch.from_numpy(means.cluster_centers_).flatten().sort().values
    return found.to(x)


def _observed(
    loaded: LoadedModel, ids: Tensor, sinks: int
) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Of each layer, for one sequence [1, n] less its sinks: keys before rotation (fp32), the
    squares of their gradients (bf16), values, theirs; [n, G, D] each."""
    keys: dict[int, Tensor] = {}
    values: dict[int, Tensor] = {}

    def see(layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        keys[layer], values[layer] = k, v

    model: Any = loaded.model
    with torch.enable_grad(), seen(model, see):
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False).logits[0]
        # Summed, not averaged: only ratios of gradients count, and larger ones keep more bits.
        loss = cross_entropy(logits[:-1].float(), ids[0, 1:], reduction="sum")
        layers = sorted(keys)
        wanted = [part[layer] for part in (keys, values) for layer in layers]
        gradients = torch.autograd.grad(loss, wanted)
    back = -torch.arange(sinks, ids.shape[1], device=ids.device)

    def tokens(x: Tensor) -> Tensor:
        return x.detach()[0].transpose(0, 1)[sinks:]

    found = []
    for number, layer in enumerate(layers):
        k, k_gradient = (
            turned(model, tokens(x).float(), back) for x in (keys[layer], gradients[number])
        )
        v, v_gradient = tokens(values[layer]), tokens(gradients[len(layers) + number]).float()
        weights = [gradient.square().bfloat16() for gradient in (k_gradient, v_gradient)]
        found.append((k, weights[0], v, weights[1]))
    return found


def _kept(x: Tensor, lower: Tensor, upper: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers of x [n, C] within their bounds, normalised to [-1, 1], and their weights."""
    half, middle = (upper - lower) / 2, (upper + lower) / 2
    normalised = (x - middle) / torch.where(half == 0, torch.ones_like(half), half)
    inside = (x >= lower) & (x <= upper)
    return normalised[inside].clamp(-1, 1), weights.flatten(1)[inside]


def _fitted(x: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Centroids by what follows their name: 2, 2_qnorm, 3, ..."""
    if not len(x):  # all are outliers: there is nothing to fit, nor to look up
        x, weights = torch.zeros(1), torch.ones(1)
    place = ((x + 1) / 2 * BINS).long().clamp(max=BINS - 1)
    # Where no gradient arrives at all, all numbers weigh the same.
    weights = weights if bool(weights.any()) else torch.ones_like(weights)
    counts = torch.bincount(place, minlength=BINS).double()
    mass = torch.bincount(place, weights.double(), minlength=BINS)
    sums = torch.bincount(place, weights.double() * x, minlength=BINS)
    plain = torch.bincount(place, x.double(), minlength=BINS) / counts.clamp(min=1)
    means = sums / mass.where(mass > 0, torch.ones_like(mass))
    mean = x.double().mean()
    deviation = x.double().std(correction=0)
    found: dict[str, Tensor] = {}
    for bits in BITS:
        own = centroids(means, mass, bits)
        numbers = own[torch.bucketize(plain, (own[1:] + own[:-1]) / 2)]
        share = counts / counts.sum()
        middle = (share * numbers).sum()
        spread = (share * (numbers - middle).square()).sum().sqrt()
        scale = deviation / spread if float(spread) > 0 else torch.ones_like(spread)
        found[f"{bits}"] = own
        found[f"{bits}_qnorm"] = (own - middle) * scale + mean
    return found
