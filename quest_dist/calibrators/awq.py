"""AWQ: scales and clipping that let 4-bit weights keep what activations make important.

Lin et al., MLSys 2024 (arXiv 2306.00978), to the procedure of its llm-awq: linears that share an
input have its channels multiplied by s = mean|x|^alpha (and what makes the input divided by it),
alpha being the one of 20 that changes the block's output least once its weights are rounded; then
each group's largest weight is lowered, at most to half, where that changes the output less, but
not of q and k. A layer is searched in the model's dtype, on the inputs that the full model
gives it.

The tensors, by layer n: `n.PREVIOUS`, the scale of what PREVIOUS makes, fp32 [channels];
`n.LINEAR.most`, fp16 [outputs, groups], the largest magnitude kept (infinite: no clipping).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quest_dist import int4, linear4

if TYPE_CHECKING:
    from quest_dist.models import LoadedModel

VERSION = 1
SETTINGS = ("group",)
SEQUENCES, LENGTH = 4, 512
ALPHAS, SHRINKS, LEAST = 20, 20, 0.5
CLIP_TOKENS = 512
#: How far scaling alone may change a layer's output, relative to its spread.
UNCHANGED = 5e-2
#: What makes an input; the linears that share it; the block whose output is compared.
SHARED = (
    ("input_layernorm", ("q_proj", "k_proj", "v_proj"), "self_attn"),
    ("self_attn.v_proj", ("o_proj",), "self_attn.o_proj"),
    ("post_attention_layernorm", ("gate_proj", "up_proj"), "mlp"),
    ("mlp.up_proj", ("down_proj",), "mlp.down_proj"),
)
CLIPPED = ("v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class _Stop(Exception):
    """The first layer's inputs are known."""


@torch.no_grad()
def make(loaded: LoadedModel, tokens: Tensor, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """Scales and clipping of every layer; ValueError for a model that they do not fit."""
    found: dict[str, Tensor] = {}
    group = int(settings["group"])
    layers = linear4.layers(loaded.model)
    hidden, given = _inputs(loaded.model, layers[0], tokens)
    for number, layer in enumerate(layers):
        work = copy.deepcopy(layer)
        seen, after = _watched(work, hidden, given)
        for previous, names, block in SHARED:
            linears = [_named(work, name) for name in names]
            maker = work.get_submodule(previous)
            x, arguments = seen[names[0]], seen[block]
            if isinstance(maker, nn.Linear) and maker.out_features != x.shape[-1]:
                continue  # heads of grouped queries share v: its channels are not o's
            scale = best_scale(linears, x, _runs(work.get_submodule(block), arguments), group)
            found[f"{number}.{previous}"] = scale
            _rescale(maker, linears, scale, loaded.model.dtype)
            for name in names:
                seen[name] = x.float() / scale
        _check_unchanged(loaded.model, number, _first(work(hidden, **given)), after)
        for name in CLIPPED:
            weight = _named(work, name).weight
            found[f"{number}.{name}.most"] = best_clip(weight, seen[name].flatten(0, -2), group)
        hidden = after
    return found


@torch.no_grad()
def apply(model: nn.Module, tensors: Mapping[str, Tensor], group: int = int4.GROUP) -> None:
    """Replace a model's projections by the rounded ones of scaled and clipped weights."""
    for number, layer in enumerate(linear4.layers(model)):
        work = copy.deepcopy(layer).float()
        for previous, names, _ in SHARED:
            if (scale := tensors.get(f"{number}.{previous}")) is None:
                continue
            maker, linears = work.get_submodule(previous), [_named(work, n) for n in names]
            _rescale(maker, linears, scale.to(linears[0].weight.device), dtype_of(layer))
            if not isinstance(maker, nn.Linear):
                layer.get_submodule(previous).weight.copy_(maker.weight)
        for owner, name in linear4.projections(layer):
            linear = _named(work, name)
            weight = linear.weight
            if (most := tensors.get(f"{number}.{name}.most")) is not None:
                weight = clipped(weight, most.to(weight.device).float(), group)
            bias = None if linear.bias is None else linear.bias.to(getattr(owner, name).bias.dtype)
            packed = int4.pack(int4.quantise(weight, group), group)
            setattr(owner, name, linear4.Linear4(packed, bias))


def dtype_of(layer: nn.Module) -> torch.dtype:
    """The dtype of a layer's weights."""
    return next(layer.parameters()).dtype


@torch.no_grad()
def best_scale(linears: list[Any], x: Tensor, run: Callable[[], Tensor], group: int) -> Tensor:
    """The scale [channels] of an input x [..., channels] with which the rounded weights of
    `linears` change what `run` gives least; the weights are as before afterwards."""
    mean = x.float().abs().flatten(0, -2).mean(0)
    kept = [linear.weight.data for linear in linears]
    want, best, least = run(), torch.ones_like(mean), float("inf")
    for step in range(ALPHAS):
        scale = mean.pow(step / ALPHAS).clamp(min=1e-4)
        scale = scale / (scale.max() * scale.min()).sqrt()
        for linear, weight in zip(linears, kept, strict=True):
            tried = int4.rounded(weight.float() * scale, group) / scale
            linear.weight.data = tried.to(weight.dtype)
        error = float((run() - want).float().square().mean())
        if error < least:
            best, least = scale, error
    for linear, weight in zip(linears, kept, strict=True):
        linear.weight.data = weight
    return best


@torch.no_grad()
def best_clip(weight: Tensor, x: Tensor, group: int) -> Tensor:
    """The largest magnitude to keep, fp16 [outputs, groups], of weights [outputs, inputs] that take
    x [tokens, inputs]: the one that changes the group's own product least."""
    x, weight = x[:: max(1, len(x) // CLIP_TOKENS)][:CLIP_TOKENS].float(), weight.float()
    found = []
    for first in range(0, weight.shape[1], group):
        part, inputs = weight[:, first : first + group], x[:, first : first + group]
        second = inputs.T @ inputs
        largest = part.abs().amax(1)
        least, most = torch.full_like(largest, torch.inf), torch.full_like(largest, torch.inf)
        for step in range(int(SHRINKS * (1 - LEAST))):
            limit = largest * (1 - step / SHRINKS)
            kept = part.clamp(-limit[:, None], limit[:, None])
            off = int4.rounded(kept, group) - part
            error = ((off @ second) * off).sum(1)
            better = error < least
            least = torch.where(better, error, least)
            if step:
                most = torch.where(better, limit, most)
        found.append(most)
    return torch.stack(found, 1).half()


def clipped(weight: Tensor, most: Tensor, group: int) -> Tensor:
    """Weights [outputs, inputs] within their groups' magnitudes [outputs, groups]."""
    limit = most.repeat_interleave(group, 1)[:, : weight.shape[1]]
    return weight.clamp(-limit, limit)


def _rescale(maker: nn.Module, linears: list[Any], scale: Tensor, dtype: torch.dtype) -> None:
    """Divide what makes an input by the scale and multiply the weights that take it.

    A norm's weight is rounded to `dtype`, the model's; the linears make up for what that changes.
    """
    weight: Any = maker.weight
    if isinstance(maker, nn.Linear):
        weight.data = (weight.data / scale[:, None]).to(weight.dtype)
        if maker.bias is not None:
            maker.bias.data = (maker.bias.data / scale).to(weight.dtype)
    else:
        before = weight.data.float()
        after = (before / scale).to(dtype).float()
        weight.data = after.to(weight.dtype)
        scale = torch.where(after == 0, scale, before / after)
    for linear in linears:
        linear.weight.data = (linear.weight.data * scale).to(linear.weight.dtype)


def _named(layer: Any, name: str) -> Any:
    """A layer's projection."""
    return getattr(layer.self_attn if name in linear4.ATTENTION else layer.mlp, name)


def _inputs(model: Any, first: nn.Module, tokens: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """What the first layer is called with: hidden states, and the rest by name."""
    taken: list[tuple[Any, Any]] = []

    def take(module: nn.Module, args: Any, kwargs: Any) -> None:
        taken.append((args, kwargs))
        raise _Stop

    hook = first.register_forward_pre_hook(take, with_kwargs=True)
    try:
        model(input_ids=tokens, use_cache=False)
    except _Stop:
        pass
    finally:
        hook.remove()
    (args, kwargs), *_ = taken
    kwargs = dict(kwargs)
    hidden = args[0] if args else kwargs.pop("hidden_states")
    return hidden, kwargs


def _watched(layer: Any, hidden: Tensor, given: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """The inputs of a layer's linears by name, the arguments of its blocks, and its output."""
    seen: dict[str, Any] = {}
    hooks = []

    def watch(module: nn.Module, key: str, whole: bool) -> None:
        def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
            seen[key] = (args, kwargs) if whole else args[0]

        hooks.append(module.register_forward_pre_hook(keep, with_kwargs=True))

    for _, names, block in SHARED:
        watch(layer.get_submodule(block), block, True)
        for name in names:
            watch(_named(layer, name), name, False)
    try:
        return seen, _first(layer(hidden, **given))
    finally:
        for hook in hooks:
            hook.remove()


def _runs(block: Any, arguments: tuple[Any, Any]) -> Callable[[], Tensor]:
    args, kwargs = arguments
    return lambda: _first(block(*args, **kwargs))


def _first(out: Any) -> Tensor:
    found: Tensor = out[0] if isinstance(out, tuple) else out
    return found


def _check_unchanged(model: nn.Module, number: int, out: Tensor, before: Tensor) -> None:
    off = float((out - before).float().square().mean().sqrt() / before.float().std())
    if not off < UNCHANGED:
        raise ValueError(
            f"{type(model).__name__}: scaling changes layer {number} by {off:.3g} of its output's"
            " spread: activation-aware scales fit Llama, Mistral and Qwen style decoders"
        )
