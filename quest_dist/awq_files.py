"""AWQ checkpoints: 4-bit weights that others made, read as AutoAWQ's `gemm` version stores them.

For each linear layer a checkpoint holds `qweight` int32 [inputs, outputs / 8], `qzeros` int32
[groups, outputs / 8] and `scales` [groups, outputs]; a word's nibble n is of output ORDER[n] of its
eight. They become `Linear4`s with the same codes, so every weight is the one of the checkpoint;
linears stored in full stay so. Nothing but safetensors is read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quest_dist import linear4
from quest_dist.int4 import Codes, pack

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@torch.no_grad()
def fill(model: Any, folder: Path, group: int, dtype: torch.dtype) -> None:
    """Give a model on the meta device the weights of a checkpoint.

    Raises ValueError for a tensor that is missing or of another shape.
    """
    tensors = _Tensors(folder)
    names = {id(module): name for name, module in model.named_modules()}
    for layer in linear4.layers(model):
        for owner, name in linear4.projections(layer):
            linear = getattr(owner, name)
            full = names[id(linear)]
            if f"{full}.qweight" not in tensors.places and f"{full}.weight" in tensors.places:
                continue
            qweight, qzeros, scales = (
                tensors.get(f"{full}.{part}") for part in ("qweight", "qzeros", "scales")
            )
            codes = decoded(qweight, qzeros, scales)
            if codes.codes.shape != linear.weight.shape:
                raise ValueError(
                    f"{folder}: {full}.qweight holds weights {list(codes.codes.shape)}, the model's"
                    f" are {list(linear.weight.shape)}"
                )
            if codes.scale.shape[1] != -(-codes.codes.shape[1] // group):
                raise ValueError(
                    f"{folder}: {full}.scales has {codes.scale.shape[1]} groups, group_size={group}"
                )
            bias = None if linear.bias is None else tensors.get(f"{full}.bias").to(dtype)
            setattr(owner, name, linear4.Linear4(pack(codes, group), bias))
    tied = model.config.get_text_config().tie_word_embeddings
    for module_name, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta and not (tied and module is model.get_output_embeddings()):
                value = tensors.get(f"{module_name}.{name}").to(dtype)
                setattr(module, name, nn.Parameter(value, requires_grad=False))
    model.tie_weights()
    _computed(model)


def decoded(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Codes:
    """A linear layer's tensors as codes; a negative scale becomes a positive one."""
    codes, zero = (_nibbles(words).T.contiguous() for words in (qweight, qzeros))
    scale = scales.T.contiguous().half()
    if bool((scale < 0).any()):
        group = codes.shape[1] // scale.shape[1]
        turned = scale < 0
        wide = turned.repeat_interleave(group, 1)
        codes = torch.where(wide, 15 - codes, codes)
        zero, scale = torch.where(turned, 15 - zero, zero), scale.abs()
    return Codes(codes, scale, zero)


def _nibbles(words: Tensor) -> Tensor:
    """int32 [n, outputs / 8] -> uint8 [n, outputs]."""
    out = torch.empty(*words.shape, len(ORDER), dtype=torch.uint8)
    for place, output in enumerate(ORDER):
        out[..., output] = (words >> (4 * place) & 15).byte()
    return out.flatten(1)


class _Tensors:
    """The tensors of a folder's safetensors by name."""

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        self.folder = folder
        self._files: list[Any] = [
            safe_open(path, framework="pt") for path in sorted(folder.glob("*.safetensors"))
        ]
        self.places: dict[str, Any] = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118

    def get(self, name: str) -> Tensor:
        """A tensor; ValueError where there is none."""
        if name not in self.places:
            raise ValueError(f"{self.folder}: the checkpoint has no tensor {name}")
        found: Tensor = self.places[name].get_tensor(name)
        return found


def _computed(model: Any) -> None:
    """Make again what no checkpoint holds, the tables of rotary embeddings."""
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            owner = model.get_submodule(name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], type(module)(config=model.config))
    left = [name for name, x in [*model.named_parameters(), *model.named_buffers()] if x.is_meta]
    if left:
        raise ValueError(f"{type(model).__name__}: nothing to make {left[0]} of")
