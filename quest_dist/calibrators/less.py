"""LESS's feature maps, trained a layer at a time: its attention is to be the dense one's.

Each sequence of the text is cut at CUTS places, as if prefilled so far: the policy holds what it
would hold there under a budget of a DIVISORS-th of it (each cut of a sequence another), everything
before the cut that it does not hold is in the state, and the queries after the cut attend to what
is held, to each other, and to the state. The loss is the mean square of what this differs from
dense attention after the layer's output projection. Only queries after a cut count; the model's own
hidden states, exact ones, are every layer's input.

H2O's scores are sums over every STRIDE-th query. Adam at RATE, halved after every quarter of the
epochs, and DROPOUT are the paper's. Ours are `sequences` of LENGTH tokens, one a step (paper: 512
of the model's length, two a step), the cuts and budgets (paper: one budget, every position),
`epochs` (paper: 40), hidden units dropped for all tokens of a step at once (paper: token by token),
and a narrower hidden layer. What all layers see of a sequence is kept until they are trained: 70 MB
a sequence for a model of 135M parameters.

Tensors: `methods.low_rank.Maps` with a leading dimension of layers, fp32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from quest_dist.attention_inputs import seen
from quest_dist.methods.low_rank import Maps, joined

if TYPE_CHECKING:
    from quest_dist.models import LoadedModel

VERSION = 2
SETTINGS = ("policy", "sinks", "recent_share", "rank", "hidden", "sequences", "epochs")
LENGTH = 1536
CUTS = 4
DIVISORS = (4, 8, 16, 32)
STRIDE = 4
BATCH, RATE, DROPOUT = 1, 1e-3, 0.3
#: What both scales begin at.
SCALE = 1e-4


class Example(NamedTuple):
    """What one layer sees of one sequence; C cuts, n queries after each, T tokens."""

    q: Tensor  # [C, H, n, D]
    k: Tensor  # [G, T, D]
    v: Tensor  # [G, T, D]
    gone: Tensor  # bool [C, G, T]: in the state
    out: Tensor  # [C, H, n, D]: attention over what is held
    lse: Tensor  # [C, H, n]
    dense: Tensor  # [C, H, n, D]


@dataclass(frozen=True)
class Policy:
    """Which tokens before a cut are held."""

    policy: str
    sinks: int
    recent_share: float

    def held(self, scores: Tensor, budget: int) -> Tensor:
        """bool [G, T] of the `budget` tokens to hold of T, by H2O's scores [G, T]."""
        length = scores.shape[1]
        position = torch.arange(length, device=scores.device)
        if self.policy == "window":
            recent = position >= length - (budget - self.sinks)
            return ((position < self.sinks) | recent).expand_as(scores)
        recent = position >= length - int(budget * self.recent_share)
        best = scores.masked_fill(recent, torch.inf).topk(budget, dim=1).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True)


def make(loaded: LoadedModel, tokens: Tensor, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """The artefact's tensors, from tokens int64 [sequences, length]."""
    policy = Policy(settings["policy"], int(settings["sinks"]), float(settings["recent_share"]))
    examples: dict[int, list[Example]] = {}
    modules = attention_modules(loaded.model)

    def see(layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        number = len(examples.setdefault(layer, []))
        scale = float(getattr(modules[layer], "scaling", q.shape[-1] ** -0.5))
        examples[layer].append(example(q[0], k[0], v[0], scale, policy, number))

    model: Any = loaded.model
    with torch.no_grad(), seen(loaded.model, see):
        for sequence in tokens:
            model.base_model(input_ids=sequence[None], use_cache=False)
    shape = int(settings["rank"]), int(settings["hidden"])
    made = []
    for layer in sorted(examples):
        projection = modules[layer].get_submodule("o_proj").get_parameter("weight")
        outward = projection.detach().float()
        made.append(trained(examples.pop(layer), outward, *shape, int(settings["epochs"]), layer))
    return {name: torch.stack([getattr(maps, name) for maps in made]) for name in Maps._fields}


def attention_modules(model: nn.Module) -> dict[int, nn.Module]:
    """Attention modules by layer; ValueError where they have no `o_proj`."""
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            if not hasattr(module, "o_proj"):
                raise ValueError(
                    f"model {type(model).__name__}: its attention has no o_proj, so LESS cannot be"
                    " trained; Llama, Mistral, Qwen2 and Qwen3 style decoders can"
                )
            found[int(module.layer_idx)] = module  # type: ignore[arg-type]
    return found


def example(q: Tensor, k: Tensor, v: Tensor, scale: float, policy: Policy, number: int) -> Example:
    """What a layer is trained on of q [H, T, D] and k, v [G, T, D] of the sequence `number`."""
    heads, length, dim = q.shape
    kv_heads = k.shape[0]
    after = max(1, length // 64)
    cuts = [length * (cut + 1) // CUTS - after for cut in range(CUTS)]
    grouped = q.float().view(kv_heads, heads // kv_heads, length, dim) * scale
    keys, values = k.float(), v.float()
    scores = torch.zeros(kv_heads, length, device=q.device)
    parts, start = [], 0
    for place, cut in enumerate(cuts):
        if policy.policy == "h2o":
            scores[:, :cut] += received(grouped[:, :, start:cut:STRIDE], keys[:, :cut], start)
        start = cut
        divisor = DIVISORS[(place + number) % len(DIVISORS)]
        budget = min(max(cut // divisor, policy.sinks + 2), cut)
        held = torch.zeros(kv_heads, length, dtype=torch.bool, device=q.device)
        held[:, :cut] = policy.held(scores[:, :cut], budget)
        parts.append(_after(grouped, keys, values, held, cut, after))
    queries = torch.stack([q[:, cut : cut + after] for cut in cuts])
    gone, out, lse, dense = (torch.stack(found) for found in zip(*parts, strict=True))
    return Example(queries, k.clone(), v.clone(), gone, out, lse, dense)


def received(q: Tensor, keys: Tensor, start: int) -> Tensor:
    """Attention that keys [G, T, D] receive from every STRIDE-th query [G, g, n, D], scaled, the
    first at position `start`: [G, T]."""
    sums = keys.new_zeros(keys.shape[:2])
    own = start + STRIDE * torch.arange(q.shape[2], device=q.device)
    future = torch.arange(keys.shape[1], device=q.device) > own[:, None]
    for head in range(q.shape[0]):
        score = (q[head] @ keys[head].T).masked_fill_(future, -torch.inf)
        sums[head] = score.softmax(-1).sum((0, 1))
    return sums


def _after(
    q: Tensor, keys: Tensor, values: Tensor, held: Tensor, cut: int, after: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of the queries after a cut: what is gone, attention over the rest and its log-sum, and dense
    attention; q [G, g, T, D] is scaled."""
    kv_heads, group, _, dim = q.shape
    seen_tokens = cut + after
    positions = torch.arange(seen_tokens, device=q.device)
    future = positions > torch.arange(cut, seen_tokens, device=q.device)[:, None]
    score = q[:, :, cut:seen_tokens] @ keys[:, None, :seen_tokens].mT
    score = score.masked_fill(future, -torch.inf)
    gone = ~held
    gone[:, cut:] = False
    kept = score.masked_fill(gone[:, None, None, :seen_tokens], -torch.inf)

    def attended(weights: Tensor) -> Tensor:
        found = weights.softmax(-1) @ values[:, None, :seen_tokens]
        return found.view(kv_heads * group, after, dim)

    lse = kept.logsumexp(-1).view(kv_heads * group, after)
    return gone, attended(kept), lse, attended(score)


def trained(
    examples: Sequence[Example],
    projection: Tensor,
    rank: int,
    hidden: int,
    epochs: int,
    layer: int,
) -> Maps:
    """The feature maps of one layer; `projection` [E, H D] turns heads into what the loss sees."""
    first = examples[0]
    _, heads, _, dim = first.q.shape
    with torch.random.fork_rng(devices=[first.q.device] if first.q.is_cuda else []):
        torch.manual_seed(layer)
        maps = beginning(heads, first.k.shape[0], dim, rank, hidden, first.q.device)
        optimiser = torch.optim.Adam(maps, lr=RATE)
        halving = torch.optim.lr_scheduler.StepLR(optimiser, max(1, epochs // 4), 0.5)
        with torch.enable_grad():
            for _ in range(epochs):
                order = torch.randperm(len(examples)).tolist()
                for start in range(0, len(order), BATCH):
                    batch = [examples[place] for place in order[start : start + BATCH]]
                    optimiser.zero_grad()
                    loss_of(maps, batch, projection, DROPOUT).backward()  # type: ignore[no-untyped-call]
                    optimiser.step()
                halving.step()
    return Maps(*(weight.detach() for weight in maps))


def beginning(
    heads: int, kv_heads: int, dim: int, rank: int, hidden: int, device: torch.device
) -> Maps:
    """Untrained feature maps: normal weights that keep variances, both scales SCALE."""

    def normal(*shape: int) -> Tensor:
        weight = torch.randn(*shape) * shape[-2] ** -0.5
        made: Tensor = weight.to(device)
        return made.requires_grad_(True)

    def scale() -> Tensor:
        return torch.full((kv_heads, 1, rank), SCALE, device=device, requires_grad=True)

    return Maps(
        normal(heads, dim, hidden),
        normal(heads, hidden, rank),
        normal(kv_heads, dim, hidden),
        normal(kv_heads, hidden, rank),
        normal(kv_heads, rank, rank),
        scale(),
        scale(),
    )


def loss_of(maps: Maps, batch: Sequence[Example], projection: Tensor, drop: float = 0.0) -> Tensor:
    """Mean square of the projected difference between LESS and dense attention."""
    total = projection.new_zeros(())
    for one in batch:
        psi = maps.psi(one.k, drop)  # [G, T, r]
        values = one.v.float()
        weighed = one.gone[..., None] * psi  # [C, G, T, r]
        hs, z = weighed.mT @ values, weighed.sum(2)
        phi = maps.phi(one.q, drop)  # [C, H, n, r]
        group = phi.shape[1] // hs.shape[1]
        weighted = phi @ hs.repeat_interleave(group, 1)
        mass = (phi @ z.repeat_interleave(group, 1)[..., None])[..., 0]
        wrong = joined(weighted, mass, one.out, one.lse) - one.dense
        wrong = wrong.transpose(1, 2).flatten(2)  # [C, n, H D]
        total = total + (wrong @ projection.T).square().mean()
    return total / len(batch)
