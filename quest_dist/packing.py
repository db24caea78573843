"""Packing: keys and values in codes of a few bits, as KIVI (arXiv 2402.02750) groups them.

A block holds `group` tokens of one kv head. Keys have a scale and a minimum for each channel of the
block, values for each token and `width` channels (`group` of them, or the head where it is
smaller). A code n stands for levels[n] * scale + minimum; scale and minimum are fp16.

    scale = (largest - smallest) / (2^bits - 1), minimum = smallest, both rounded to fp16;
    n = round((x - minimum) / scale), half to even, within 0..2^bits - 1; 0 where scale is 0.

What lies where in a block of T tokens and D channels, in bytes:

    keys' scales [D] and minima [D], values' scales [D / width, T] and minima; up to a multiple of
    64; then the keys' tiles and the values' tiles, T / 16 of each.

A tile is 16 tokens in vectors of 32 codes, 8 for every 16 channels (the last may lack some). In
vector v, code i is of keys token i // 2, channel 2 v + i % 2, and of values token
2 (v % 8) + i % 2, channel 16 (v // 8) + i // 2: pairs, as processors multiply bf16. A word of 16
bits holds code i of 16 / bits vectors, the first in its lowest bits; 32 words follow one another,
then those of the next vectors. Codes of 3 bits are 2 low ones, for all vectors, then the high one.

KVQuant (arXiv 2401.18079) packs keys before their rotation, and outliers apart: see `Nuq`. Its
blocks are one tile and hold codes alone; code i of its keys' vector v is of channel
v + i % 2 * D / 2, so that a pair is what a rotation turns.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

TILE = 16
#: Bits of a code -> those of its planes, the lowest first.
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}
BITS = tuple(PLANES)
_HALF = torch.finfo(torch.float16).max


class Nuq(NamedTuple):
    """What KVQuant's codes need beside them; B blocks of TILE tokens, D channels.

    A code of a key stands for levels[n] * keys[g, 0] + keys[g, 1], turned to the token's position,
    one of a value for levels[n] * values[b, 1, t] + values[b, 0, t]. To what codes stand for, and
    before the rotation, a block's outliers are added: entries starts[b, g] to starts[b, g + 1] to
    the keys of kv head g, from starts[b, G + g] on to its values, places ascending. The first
    `sinks` tokens of a row are read from the pool.
    """

    keys: Tensor  # fp32 [G, 2, D]
    values: Tensor  # fp16 [B, 2, TILE]
    starts: Tensor  # int32 [B, 2 G + 1]
    outliers: Tensor  # int16 [E, 2]: token of the block * D + channel, and the bits of an fp16
    cos: Tensor  # fp32 [positions, D / 2]
    sin: Tensor
    sinks: int


class Packed(NamedTuple):
    """A layer's packed blocks, and the rows that look into them; letters as in `ops`.

    Row r's token t lies in block table[r, t // group]; its first keys[r] keys and values[r] values
    are packed, the rest is in the pool alone. keys[r] is a multiple of the group, unless `nuq` says
    how to read the blocks.
    """

    blocks: Tensor  # uint8 [B blocks, G, bytes of a block]
    table: Tensor  # int32 [R, W]
    keys: Tensor  # int32 [R]
    values: Tensor  # int32 [R]
    levels: Tensor  # fp32 [2, 2^bits]: what codes of keys, and of values, stand for
    group: int
    nuq: Nuq | None = None

    @property
    def bits(self) -> int:
        """Of a code."""
        return self.levels.shape[1].bit_length() - 1

    def layout(self, dim: int) -> Layout:
        """Of its blocks, for heads of `dim` channels; ValueError for what cannot be packed."""
        return Layout(self.bits, self.group, dim, self.nuq is not None)


@dataclass(frozen=True)
class Layout:
    """Offsets in a block of `group` tokens of `dim` channels in `bits`, of codes alone where it is
    `nuq`; ValueError for what cannot be packed."""

    bits: int
    group: int
    dim: int
    nuq: bool = False

    def __post_init__(self) -> None:
        """Validate the sizes."""
        if self.bits not in BITS:
            raise ValueError(f"bits={self.bits}: choose one of {', '.join(map(str, BITS))}")
        if self.group < TILE or self.group % TILE:
            raise ValueError(f"group={self.group}: choose a multiple of {TILE} tokens")
        if self.nuq:
            if self.group != TILE:
                raise ValueError(f"group={self.group}: a block of nuq codes holds {TILE} tokens")
            if self.dim % 2:
                raise ValueError(f"a head of {self.dim} channels has no halves to turn")
        elif self.dim % self.width:
            raise ValueError(
                f"group={self.group}: a head of {self.dim} channels is not made of whole groups"
            )

    @property
    def width(self) -> int:
        """Channels of a group of values."""
        return min(self.group, self.dim)

    @property
    def vectors(self) -> int:
        """Vectors of a tile."""
        return 8 * -(-self.dim // 16)

    @property
    def tile_bytes(self) -> int:
        """A tile's codes, of keys or of values."""
        return sum(64 * -(-self.vectors * plane // 16) for plane in PLANES[self.bits])

    @property
    def value_scales(self) -> int:
        """Where the values' scales begin."""
        return 4 * self.dim

    @property
    def value_minima(self) -> int:
        """Where the values' minima begin."""
        return self.value_scales + 2 * self.group * self.dim // self.width

    @property
    def key_codes(self) -> int:
        """Where the keys' tiles begin."""
        return 0 if self.nuq else -(-(2 * self.value_minima - self.value_scales) // 64) * 64

    @property
    def value_codes(self) -> int:
        """Where the values' tiles begin."""
        return self.key_codes + self.group // TILE * self.tile_bytes

    @property
    def bytes(self) -> int:
        """Of a block."""
        return 2 * self.value_codes - self.key_codes


def uniform(bits: int) -> Tensor:
    """The levels 0, 1, ... of keys and of values: fp32 [2, 2^bits]."""
    return torch.arange(2**bits, dtype=torch.float32).repeat(2, 1)


def quantised(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 of x, whose dimension `dim` is a group, with scale and minimum (fp16, kept)."""
    exact = x if x.dtype == torch.float64 else x.float()
    low, high = exact.amin(dim, keepdim=True), exact.amax(dim, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).clamp(max=_HALF).half()
    minimum = low.clamp(-_HALF, _HALF).half()
    steps = (exact - minimum.to(exact.dtype)) / scale.to(exact.dtype)
    codes = steps.clamp(0, 2**bits - 1).round().masked_fill(scale == 0, 0)
    return codes.to(torch.uint8), scale, minimum


@cache
def _addresses(bits: int, dim: int, values: bool) -> tuple[tuple[Tensor, Tensor, int], ...]:
    """For each plane of a tile's codes [16, dim]: word and shift of each, and the plane's bits."""
    token, channel = torch.meshgrid(torch.arange(TILE), torch.arange(dim), indexing="ij")
    if values:
        vector, place = channel // 16 * 8 + token // 2, channel % 16 * 2 + token % 2
    else:
        vector, place = channel // 2, token * 2 + channel % 2
    found, start = [], 0
    for plane in PLANES[bits]:
        each = 16 // plane
        found.append((start + vector // each * 32 + place, vector % each * plane, plane))
        start += 32 * -(-8 * -(-dim // 16) // each)
    return tuple(found)


def tile_bytes_of(codes: Tensor, bits: int) -> Tensor:
    """Vectors of codes [..., V, 32], as many as a tile has, as uint8 [..., tile_bytes]."""
    planes, shift = [], 0
    for plane in PLANES[bits]:
        each = 16 // plane
        part = (codes.int() >> shift) & (2**plane - 1)
        whole = torch.nn.functional.pad(part, (0, 0, 0, -part.shape[-2] % each))
        strips = whole.reshape(*codes.shape[:-2], -1, each, 32)
        places = plane * torch.arange(each, dtype=torch.int32, device=codes.device)
        words = (strips << places[:, None]).sum(-2, dtype=torch.int32).to(torch.int16)
        planes.append(words.view(torch.uint8).flatten(-2))
        shift += plane
    return torch.cat(planes, -1)


def _words(block: Tensor, layout: Layout, tile: int, values: bool) -> Tensor:
    start = (layout.value_codes if values else layout.key_codes) + tile * layout.tile_bytes
    return block[start : start + layout.tile_bytes].view(torch.int16)


def put_codes(block: Tensor, layout: Layout, tile: int, codes: Tensor, *, values: bool) -> None:
    """Write codes [16, D] into a tile of a block (uint8, one kv head)."""
    words = _words(block, layout, tile, values).int() * 0
    shift = 0
    for word, place, plane in _addresses(layout.bits, layout.dim, values):
        part = ((codes.int() >> shift) & (2**plane - 1)) << place
        words.index_put_((word.flatten(),), part.flatten().int(), accumulate=True)
        shift += plane
    _words(block, layout, tile, values).copy_(words)


def get_codes(block: Tensor, layout: Layout, tile: int, *, values: bool) -> Tensor:
    """The codes [16, D] of a tile of a block, int64."""
    words = _words(block, layout, tile, values).long() & 0xFFFF
    codes, shift = torch.zeros(TILE, layout.dim, dtype=torch.long), 0
    for word, place, plane in _addresses(layout.bits, layout.dim, values):
        codes += ((words[word] >> place) & (2**plane - 1)) << shift
        shift += plane
    return codes


def scales(block: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Views of a block's fp16 numbers: of keys scale and minimum [D], of values [D / width, T]."""

    def half(start: int, end: int) -> Tensor:
        return block[start:end].view(torch.float16)

    end = 2 * layout.value_minima - layout.value_scales
    of_values = (half(layout.value_scales, layout.value_minima), half(layout.value_minima, end))
    scale, minimum = (one.view(-1, layout.group) for one in of_values)
    of_keys = half(0, 2 * layout.dim), half(2 * layout.dim, 4 * layout.dim)
    return *of_keys, scale, minimum
