"""Int4: linear layers whose weights are in 4 bits, and the ops over them.

The format is AWQ's: of each output, `group` inputs in a row share a scale (fp16, positive) and a
zero (0..15), and code c stands for (c - zero) scale. The last group of an output may be smaller.
How codes lie in memory stands in kernels/ops.h; here `pack` writes it and `unpack` reads it.

Invariants: quantising and packing are deterministic. `linear` multiplies few rows with the weights
as they are (a row's bits then depend neither on the other rows nor on the number of threads), and
many with weights rounded to the dtype of x, a block of outputs at a time; where a gradient is
asked for, always so. Sums are fp32, and rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quest_dist import on_cuda
from quest_dist.arguments import DTYPES, Arguments
from quest_dist.backend import by_reference, compiled, compiled_cuda, threads

GROUP = 128
LEVELS = 15
#: Of the layout: outputs of a tile, bytes of a line, inputs of a line.
TILE, LINE, LINE_INPUTS = 16, 64, 8
#: Rows up to which the weights are not widened, by device.
FEW_ROWS = {"cpu": 128, "cuda": 16}
#: Outputs that are widened at a time for more rows: a few megabytes.
WIDENED = 1024


@dataclass(frozen=True)
class Codes:
    """Weights [outputs, inputs] as codes uint8 [outputs, inputs], scale fp16 and zero uint8, both
    [outputs, groups]."""

    codes: Tensor
    scale: Tensor
    zero: Tensor

    def widened(self, group: int) -> Tensor:
        """The weights that they stand for, fp32."""
        inputs = self.codes.shape[1]
        scale, zero = (
            x.float().repeat_interleave(group, 1)[:, :inputs] for x in (self.scale, self.zero)
        )
        return (self.codes.float() - zero) * scale


@dataclass(frozen=True)
class Int4:
    """Packed weights: data uint8 [tiles, lines, 64], on one device."""

    data: Tensor
    outputs: int
    inputs: int
    group: int


def quantise(weight: Tensor, group: int = GROUP) -> Codes:
    """Round weights [outputs, inputs] to the nearest codes.

    A group's scale is (max - min) / 15, at least 1e-5, and its zero -min / scale, both of a range
    that holds 0; so a weight is at most half a scale off, and at the ends of the range one.
    """
    parts = [
        (codes.byte().flatten(1), scale, zero.byte())
        for codes, scale, zero in map(_nearest, _grouped(weight, group))
    ]
    return Codes(*(torch.cat(x, 1) for x in zip(*parts, strict=True)))


def rounded(weight: Tensor, group: int = GROUP) -> Tensor:
    """What `quantise` makes of weights [outputs, inputs], widened again to fp32."""
    parts = [
        codes.sub_(zero[..., None]).mul_(scale.float()[..., None]).flatten(1)
        for codes, scale, zero in map(_nearest, _grouped(weight, group))
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _grouped(weight: Tensor, group: int) -> list[Tensor]:
    """Weights as fp32 [outputs, groups, inputs of a group]: the whole groups, and the last."""
    whole = weight.shape[1] - weight.shape[1] % group
    parts = ((weight[:, :whole], group), (weight[:, whole:], weight.shape[1] - whole))
    return [part.reshape(len(part), -1, width).float() for part, width in parts if part.shape[1]]


def _nearest(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and zero; codes and zero as fp32."""
    low, high = groups.aminmax(dim=-1)
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    # Codes are of the scale that is kept, which fp16 rounds.
    scale = ((high - low) / LEVELS).clamp(min=1e-5).half()
    wide = scale.float()
    zero = (-low / wide).round().clamp(0, LEVELS)
    codes = (groups / wide[..., None]).round_().add_(zero[..., None]).clamp_(0, LEVELS)
    return codes, scale, zero


def pack(codes: Codes, group: int = GROUP) -> Int4:
    """Codes in the layout of the kernels; ValueError for sizes that are no multiples of 8."""
    outputs, inputs = codes.codes.shape
    for name, size in (("group", group), ("inputs", inputs)):
        if size % LINE_INPUTS or size < LINE_INPUTS:
            raise ValueError(f"weights in 4 bits: {name}={size} is no multiple of {LINE_INPUTS}")
    tiles, lines, per_group = -(-outputs // TILE), inputs // LINE_INPUTS, group // LINE_INPUTS
    missing = tiles * TILE - outputs
    padded = torch.nn.functional.pad(codes.codes, (0, 0, 0, missing)).int()
    words = torch.zeros(tiles * TILE, lines, dtype=torch.int32, device=padded.device)
    for i in range(LINE_INPUTS):
        words |= padded[:, i::LINE_INPUTS] << _shift(i)
    words = words.view(tiles, TILE, lines).transpose(1, 2).contiguous()
    groups = codes.scale.shape[1]
    data = torch.zeros(tiles, lines + groups, LINE, dtype=torch.uint8, device=padded.device)
    heads, rest = _places(lines, groups, per_group, padded.device)
    data[:, rest] = words.view(torch.uint8).view(tiles, lines, LINE)
    for at, of in ((0, codes.scale.view(torch.uint8)), (2 * TILE, codes.zero)):
        width = of.shape[1] // groups
        filled = torch.nn.functional.pad(of, (0, 0, 0, missing)).view(tiles, TILE, groups, width)
        data[:, heads, at : at + TILE * width] = filled.transpose(1, 2).flatten(2)
    return Int4(data, outputs, inputs, group)


def unpack(weight: Int4) -> Codes:
    """The codes that were packed."""
    tiles, lines = weight.data.shape[0], weight.inputs // LINE_INPUTS
    groups = -(-weight.inputs // weight.group)
    heads, rest = _places(lines, groups, weight.group // LINE_INPUTS, weight.data.device)
    words = weight.data[:, rest].contiguous().view(torch.int32)  # [tiles, lines, 16]
    codes = torch.stack([words >> _shift(i) & LEVELS for i in range(LINE_INPUTS)], -1)
    codes = codes.permute(0, 2, 1, 3).reshape(tiles * TILE, weight.inputs)
    head = weight.data[:, heads]  # [tiles, groups, 64]
    scale = head[..., : 2 * TILE].contiguous().view(torch.float16)
    zero = head[..., 2 * TILE : 3 * TILE]
    scale, zero = (x.transpose(1, 2).reshape(tiles * TILE, groups) for x in (scale, zero))
    every = slice(0, weight.outputs)
    return Codes(codes[every].byte(), scale[every], zero[every])


def _shift(i: int) -> int:
    """Where input i of a line lies in its word."""
    return 16 * (i % 2) + 4 * (i // 2)


def _places(lines: int, groups: int, per_group: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of a tile's lines, the groups' heads and the others."""
    heads = torch.arange(groups, device=device) * (per_group + 1)
    line = torch.arange(lines, device=device)
    return heads, line + line // per_group + 1


def linear(x: Tensor, weight: Int4, bias: Tensor | None = None) -> Tensor:
    """x [..., inputs] times the weights: [..., outputs], in the dtype of x."""
    a = Arguments("linear4", any_float=x.requires_grad)
    flat = x.reshape(-1, x.shape[-1])
    a.floats("x", flat, "R I")
    _take(a, weight)
    rows = a["R"]
    if by_reference():
        out = torch.nn.functional.linear(flat, widened(weight, x.dtype))
    elif (x.requires_grad and torch.is_grad_enabled()) or rows > FEW_ROWS[x.device.type]:
        blocks = [
            torch.nn.functional.linear(flat, widened(weight, x.dtype, first, WIDENED))
            for first in range(0, weight.outputs, WIDENED)
        ]
        out = blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)
    elif x.is_cuda:
        out = on_cuda.linear4(_native(compiled_cuda(), weight), flat, weight.outputs)
    else:
        out = torch.empty(rows, weight.outputs, dtype=x.dtype)
        kind = DTYPES[x.dtype]
        compiled().linear4(
            _native(compiled(), weight), flat.data_ptr(), kind, rows, out.data_ptr(), threads()
        )
    if bias is not None:
        out = out + bias
    return out.view(*x.shape[:-1], weight.outputs)


def widened(weight: Int4, dtype: torch.dtype, first: int = 0, count: int | None = None) -> Tensor:
    """The weights of `count` outputs (or as many as there are) from `first` on, rounded to dtype.

    `first` is a multiple of 16.
    """
    a = Arguments("widen4", any_float=True)
    _take(a, weight)
    left = weight.outputs - first
    if first % TILE or left < 1:
        raise a.refuse("first", first, f"a multiple of {TILE} below {weight.outputs}")
    count = left if count is None else min(count, left)
    device = weight.data.device
    if by_reference() or dtype not in DTYPES:
        some = slice(first // TILE, -(-(first + count) // TILE))
        part = Int4(weight.data[some], count, weight.inputs, weight.group)
        return unpack(part).widened(weight.group).to(dtype)
    if device.type == "cuda":
        return on_cuda.widen4(_native(compiled_cuda(), weight), weight, dtype, first, count)
    if dtype == torch.float16:
        raise a.refuse("dtype", dtype, "float32 or bfloat16 on a CPU")
    out = torch.empty(count, weight.inputs, dtype=dtype)
    native = _native(compiled(), weight)
    compiled().widen4(native, first, count, DTYPES[dtype], out.data_ptr(), threads())
    return out


def _take(a: Arguments, weight: Int4) -> None:
    """Check that packed weights are of the size that they state, and x of theirs."""
    a.of_dtype("weight.data", weight.data, f"T L {LINE}", torch.uint8)
    groups = -(-weight.inputs // weight.group)
    wanted = (-(-weight.outputs // TILE), weight.inputs // LINE_INPUTS + groups)
    if (a["T"], a["L"]) != wanted:
        raise a.refuse("weight.data", f"of {a['T']} x {a['L']} lines", f"{wanted[0]} x {wanted[1]}")
    if a.sizes.get("I", weight.inputs) != weight.inputs:
        raise a.refuse("x", f"of {a['I']} channels", f"the {weight.inputs} inputs of the weights")
    if weight.data.device.type not in FEW_ROWS and not by_reference():
        raise a.refuse("weight.data", f"on {weight.data.device}", "a tensor on cpu or cuda")


def _native(native: Any, weight: Int4) -> Any:
    sizes = (weight.outputs, weight.inputs, weight.group)
    return native.Int4(weight.data.data_ptr(), *sizes)
