"""Linear4: a decoder's linear layers with weights in 4 bits, in the place of torch's.

Of every layer the projections of attention and MLP are replaced, as in AWQ; embeddings, norms and
the output's weights stay as they are. The module is the same for all that make such weights
(rounding here, `calibrators.awq`, a checkpoint through `awq_files`), for accuracy and for times.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from quest_dist import int4
from quest_dist.int4 import Int4

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


class Linear4(nn.Module):
    """y = x W + bias with W in 4 bits; no gradient reaches W."""

    def __init__(self, weight: Int4, bias: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("packed", weight.data)
        self.in_features, self.out_features = weight.inputs, weight.outputs
        self.group = weight.group
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def weight4(self) -> Int4:
        """The packed weights, where the module is."""
        data = self.packed
        assert isinstance(data, Tensor)
        return Int4(data, self.out_features, self.in_features, self.group)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        return int4.linear(x, self.weight4, self.bias)

    def extra_repr(self) -> str:
        """For people."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bits=4"


def layers(model: nn.Module) -> list[Any]:
    """The decoder layers of a model; ValueError unless each has the projections of a Llama."""
    found: Any = getattr(getattr(model, "base_model", model), "layers", None)
    for layer in found if isinstance(found, nn.ModuleList) else [None]:
        for part, names in (("self_attn", ATTENTION), ("mlp", MLP)):
            for name in names:
                if not isinstance(getattr(getattr(layer, part, None), name, None), nn.Linear):
                    raise ValueError(
                        f"{type(model).__name__} has a layer without {part}.{name}: weights in 4"
                        " bits are made for Llama, Mistral, Qwen2 and Qwen3 style decoders"
                    )
    assert isinstance(found, nn.ModuleList)
    return list(found)


def projections(layer: Any) -> Iterator[tuple[nn.Module, str]]:
    """Each projection of a layer, as the module that has it and its name there."""
    yield from ((layer.self_attn, name) for name in ATTENTION)
    yield from ((layer.mlp, name) for name in MLP)


@torch.no_grad()
def round_to_nearest(model: nn.Module, group: int = int4.GROUP) -> None:
    """Replace a model's projections, rounding their weights to the nearest codes."""
    for layer in layers(model):
        for owner, name in projections(layer):
            linear = getattr(owner, name)
            packed = int4.pack(int4.quantise(linear.weight, group), group)
            setattr(owner, name, Linear4(packed, linear.bias))
