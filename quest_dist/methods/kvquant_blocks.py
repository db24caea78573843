"""KVQuant's cache of one layer: blocks of TILE tokens in codes, and their outliers beside them.

Keys come before their rotation and are quantised per channel by statistics that were fixed offline;
values per token, over all kv heads together, by the token itself. Either way a number x becomes the
nearest centroid to (x - offset) / range, where [offset - range, offset + range] are the bounds of
what is no outlier. Of an outlier, what its code is off by is kept in fp16 with its place in the
block, in 16 bits. What lies where says quest_dist.packing.Nuq.

Invariants: a token's codes and outliers depend on that token and the rules only, so tokens may be
added in any portions; bytes held are `cache_bytes`, with the outlier keys that there really are.

Shape letters: G kv heads, D head dim, C = G D channels, n blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from quest_dist import nuq, ops
from quest_dist.nuq import Codebook
from quest_dist.packing import TILE, Layout, tile_bytes_of

#: Bytes of an outlier (fp16, and its place), of a value's offset and range (fp16 each), and of one
#: of a block's 2 G + 1 starts.
OUTLIER, NORM, START = 4, 4, 4
LARGEST = torch.finfo(torch.float16).max
#: Blocks that are quantised at a time.
AT_ONCE = 128


@dataclass(frozen=True)
class Rules:
    """How one layer is quantised: bounds of the keys that are no outliers, fp32 [G, D], the
    codebooks, and the share of `outliers`."""

    lower: Tensor
    upper: Tensor
    keys: Codebook
    values: Codebook
    outliers: float

    @property
    def key_norms(self) -> Tensor:
        """Range and offset of keys, fp32 [G, 2, D]."""
        bounds = (self.upper - self.lower) / 2, (self.upper + self.lower) / 2
        return torch.stack(bounds, 1).contiguous()


def outlier_values(channels: int, share: float) -> tuple[int, int]:
    """How many of a token's values are outliers at the low and at the high end: those that its own
    quantiles, share / 2 and 1 - share / 2, do not exceed or fall short of."""
    if share == 0.0:
        return 0, 0
    high = channels - math.ceil(round((channels - 1) * (1.0 - share / 2), 9))
    return min(high, channels - high), high


def value_bounds(flat: Tensor, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """The least and the greatest of each token's values [n, C] that are no outliers, [n, 1], and
    the channels of those that are, int64 [n, outliers]."""
    channels = flat.shape[1]
    low, high = outlier_values(channels, share)
    ranked, order = flat.sort(dim=1, stable=True)
    least, most = min(low, channels - 1), max(0, channels - 1 - high)
    outliers = torch.cat([order[:, :low], order[:, channels - high :]], 1)
    return ranked[:, least : least + 1], ranked[:, most : most + 1], outliers


def cache_bytes(
    kv_heads: int, head_dim: int, bits: int, share: float, tokens: int, sinks: int
) -> float:
    """Bytes of a row's tokens but for the sinks themselves, where `share` of the keys are outliers:
    whole blocks, outliers, and the rules."""
    channels = kv_heads * head_dim
    codes = 2 * kv_heads * Layout(bits, TILE, head_dim, nuq=True).tile_bytes
    block = codes + TILE * NORM + START * (2 * kv_heads + 1)
    outliers = share * channels + sum(outlier_values(channels, share))
    own = -(-tokens // TILE) * block + OUTLIER * outliers * max(0, tokens - sinks)
    return own + rules_bytes(channels, bits)


def rules_bytes(channels: int, bits: int) -> int:
    """Bytes of a layer's rules: two norms a channel and two codebooks, fp32."""
    return 4 * (2 * channels + (2 << bits))


class Encoded(NamedTuple):
    """Blocks as they are kept, one after the other; how many outliers each has, by kv head of its
    keys and of its values; and these."""

    codes: Tensor  # uint8 [n, G, bytes]
    norms: Tensor  # fp16 [n, 2, TILE]
    counts: Tensor  # int64 [n, 2 G]
    outliers: Tensor  # int16 [sum of counts, 2]


def encoded(k: Tensor, v: Tensor, there: Tensor, rules: Rules) -> Encoded:
    """Blocks of keys before rotation and values, fp32 [n, TILE, G, D] each, of which those tokens
    are `there`, bool [n, TILE]; the others have no outliers, and codes that mean nothing."""
    n, _, heads, dim = k.shape
    key_codes, key_off, key_outlier = _keys(k, rules)
    value_codes, value_off, value_outlier, norms = _values(v, rules)
    off = torch.stack([key_off, value_off], 1).permute(0, 1, 3, 2, 4)  # [n, 2, G, TILE, D]
    outlier = torch.stack([key_outlier, value_outlier], 1) & there[:, None, :, None, None]
    outlier = outlier.permute(0, 1, 3, 2, 4)
    found = outlier.nonzero()
    places = (found[:, 3] * dim + found[:, 4]).to(torch.int16)
    exact = off[outlier].clamp(-LARGEST, LARGEST).half().view(torch.int16)
    tiles = torch.cat(
        [
            tile_bytes_of(_key_vectors(key_codes), rules.keys.bits),
            tile_bytes_of(_value_vectors(value_codes), rules.values.bits),
        ],
        -1,
    )
    counts = outlier.sum((3, 4)).view(n, 2 * heads)
    return Encoded(tiles, norms, counts, torch.stack([places, exact], 1))


class Blocks:
    """One layer's blocks, by number, and the rules by which they are made; beside the pool's pages
    kv [N, G, 2, S, D]."""

    def __init__(self, rules: Rules, kv: Tensor) -> None:
        _, kv_heads, _, _, head_dim = kv.shape
        device = kv.device
        self.rules = rules
        self.key_norms = rules.key_norms
        self.levels = torch.stack([rules.keys.meanings, rules.values.meanings]).float()
        self._layout = Layout(rules.keys.bits, TILE, head_dim, nuq=True)
        self.codes = ops.allocate_blocks(0, kv_heads, self._layout, device)
        self.norms = torch.zeros(0, 2, TILE, dtype=torch.float16, device=device)
        self.starts = torch.zeros(0, 2 * kv_heads + 1, dtype=torch.int32, device=device)
        self.outliers = torch.zeros(0, 2, dtype=torch.int16, device=device)
        self._full = 0  # outliers of blocks that will not change

    def grow(self, blocks: int) -> None:
        """Have room for so many blocks."""
        have = self.codes.shape[0]
        if have >= blocks:
            return
        room = max(blocks, 2 * have)
        codes = ops.allocate_blocks(room, self.codes.shape[1], self._layout, self.codes.device)
        codes[:have] = self.codes
        self.codes = codes
        self.norms = pad(self.norms, (0, 0, 0, 0, 0, room - have))
        self.starts = pad(self.starts, (0, 0, 0, room - have))

    def put(self, ids: list[int], blocks: Encoded, *, full: bool) -> None:
        """Write blocks under their numbers. Those that are not `full` are written last in a step,
        and anew in the next."""
        at = torch.tensor(ids, device=self.codes.device)
        self.codes[at], self.norms[at] = blocks.codes, blocks.norms
        count, start = len(blocks.outliers), self._full
        if start + count > len(self.outliers):
            room = max(start + count, 2 * len(self.outliers)) - len(self.outliers)
            self.outliers = pad(self.outliers, (0, 0, 0, room))
        self.outliers[start : start + count] = blocks.outliers
        ends = start + blocks.counts.flatten().cumsum(0).view(blocks.counts.shape)
        first = ends[:, :1] - blocks.counts[:, :1]
        self.starts[at] = torch.cat([first, ends], 1).int()
        if full:
            self._full += count


def _keys(k: Tensor, rules: Rules) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, what they are off by, and which of the keys [n, TILE, G, D] are outliers."""
    half, middle = rules.key_norms.unbind(1)
    codes = nuq.nearest(_normalised(k, middle, half), rules.keys)
    off = k - torch.addcmul(middle, rules.keys.meanings[codes], half)
    outlier = (k < rules.lower) | (k > rules.upper)
    return codes, off, outlier if rules.outliers > 0.0 else torch.zeros_like(outlier)


def _values(v: Tensor, rules: Rules) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same of values, and their norms fp16 [n, 2, TILE]."""
    flat = v.reshape(v.shape[0] * TILE, -1)
    least, most, channels = value_bounds(flat, rules.outliers)
    norm = torch.cat([(most + least) / 2, (most - least) / 2], 1).clamp(-LARGEST, LARGEST).half()
    middle, half = norm.float()[:, :, None].unbind(1)
    codes = nuq.nearest(_normalised(flat, middle, half), rules.values)
    off = flat - torch.addcmul(middle, rules.values.meanings[codes], half)
    outlier = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, channels, True)
    norms = norm.view(-1, TILE, 2).transpose(1, 2)
    return codes.view(v.shape), off.view(v.shape), outlier.view(v.shape), norms


def _normalised(x: Tensor, middle: Tensor, half: Tensor) -> Tensor:
    """(x - middle) / half; where nothing varies, whatever: the code stands for `middle` then."""
    return (x - middle) / torch.where(half == 0, torch.ones_like(half), half)


def _key_vectors(codes: Tensor) -> Tensor:
    """Keys' codes [n, TILE, G, D] in the vectors of a tile, [n, G, V, 32]."""
    n, _, heads, dim = codes.shape
    pairs = codes.view(n, TILE, heads, 2, dim // 2).permute(0, 2, 4, 1, 3).reshape(n, heads, -1, 32)
    return pad(pairs, (0, 0, 0, 8 * -(-dim // 16) - dim // 2))


def _value_vectors(codes: Tensor) -> Tensor:
    """Values' codes, the same."""
    n, _, heads, dim = codes.shape
    whole = pad(codes, (0, -dim % 16)).view(n, TILE // 2, 2, heads, -1, 16)
    return whole.permute(0, 3, 4, 1, 5, 2).reshape(n, heads, -1, 32)
