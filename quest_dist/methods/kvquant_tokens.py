"""KVQuant's cache of one layer: tokens as packed codes, and their outliers beside them.

Keys come before their rotation and are quantised per channel by statistics that were fixed offline;
values per token, over all kv heads together, by the token itself. Either way a number x that is no
outlier becomes the nearest centroid to (x - offset) / range, where [offset - range, offset + range]
are the bounds of what is no outlier; outliers are kept in fp16 with the channel they belong to, in
16 bits.

Invariants: a token's codes depend on that token and the rules only, so tokens may be added in any
portions; bytes held are `token_bytes` a token, with the outlier keys that there really are.

Shape letters: G kv heads, D head dim, C = G D channels, n tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from quest_dist import nuq
from quest_dist.nuq import Codebook

#: Bytes of an outlier (fp16, and its channel), of a value's offset and range (fp16 each), and of
#: the number of a token's outlier keys.
OUTLIER, NORM, COUNT = 4, 4, 2
LARGEST = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Rules:
    """How one layer is quantised: bounds of the keys that are no outliers, fp32 [C], the codebooks,
    and the share of `outliers`."""

    lower: Tensor
    upper: Tensor
    keys: Codebook
    values: Codebook
    outliers: float


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


def token_bytes(kv_heads: int, head_dim: int, bits: int, share: float) -> float:
    """Bytes of one token's key and value, where `share` of the keys are outliers."""
    channels = kv_heads * head_dim
    codes = 2 * kv_heads * nuq.packed_bytes(head_dim, bits)
    return (
        codes + OUTLIER * (share * channels + sum(outlier_values(channels, share))) + NORM + COUNT
    )


def rules_bytes(channels: int, bits: int) -> int:
    """Bytes of a layer's rules: two bounds a channel and two codebooks, fp32."""
    return 4 * (2 * channels + 2 * 2**bits)


@dataclass
class Tokens:
    """Consecutive tokens, in the order of their positions.

    Codes are uint8 [n, G, packed]; `key_outliers` int16 [n] says how many entries of `key_channels`
    and `key_exact` (fp16) are a token's; `value_norm` fp16 [n, 2] holds offset and range,
    `value_channels` int16 and `value_exact` fp16 [n, as many as `outlier_values`].
    """

    key_codes: Tensor
    key_outliers: Tensor
    key_channels: Tensor
    key_exact: Tensor
    value_codes: Tensor
    value_norm: Tensor
    value_channels: Tensor
    value_exact: Tensor

    def __len__(self) -> int:
        return self.key_codes.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(getattr(self, field.name).nbytes for field in fields(self))

    def followed_by(self, later: Tokens) -> Tokens:
        """These tokens and the later ones."""
        names = [field.name for field in fields(self)]
        return Tokens(*(torch.cat([getattr(self, n), getattr(later, n)]) for n in names))

    @classmethod
    def of(cls, k: Tensor, v: Tensor, rules: Rules) -> Tokens:
        """Quantise keys before rotation and values, fp32 [n, G, D] each."""
        return cls(*_encoded_keys(k, rules), *_encoded_values(v, rules))

    def keys(self, rules: Rules, head_dim: int) -> Tensor:
        """The keys that the codes and outliers stand for, fp32 [n, G, D]."""
        numbers = nuq.looked_up(self.key_codes, rules.keys, head_dim)
        heads = numbers.shape[1:]
        half, middle = (rules.upper - rules.lower) / 2, (rules.upper + rules.lower) / 2
        numbers = torch.addcmul(middle.view(heads), numbers, half.view(heads))
        channels = heads.numel()
        starts = torch.arange(0, len(self) * channels, channels, device=numbers.device)
        where = torch.repeat_interleave(
            starts, self.key_outliers.long(), output_size=self.key_exact.shape[0]
        )
        flat = numbers.view(-1)
        flat[where + self.key_channels] = self.key_exact.float()
        return numbers

    def values(self, rules: Rules, head_dim: int) -> Tensor:
        """The values that the codes and outliers stand for, fp32 [n, G, D]."""
        numbers = nuq.looked_up(self.value_codes, rules.values, head_dim)
        middle, half = self.value_norm.float()[:, :, None, None].unbind(1)
        numbers = torch.addcmul(middle, numbers, half)
        flat = numbers.view(len(self), -1)
        flat.scatter_(1, self.value_channels.long(), self.value_exact.float())
        return numbers


def _encoded_keys(k: Tensor, rules: Rules) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    half, middle = (rules.upper - rules.lower) / 2, (rules.upper + rules.lower) / 2
    flat = k.flatten(1)
    codes = nuq.nearest(_normalised(flat, middle, half), rules.keys).view(k.shape)
    beyond = (flat < rules.lower) | (flat > rules.upper)
    if rules.outliers == 0.0:
        beyond = torch.zeros_like(beyond)
    token, channel = beyond.nonzero().unbind(1)
    exact = _half_precision(flat[token, channel])
    counts = beyond.sum(1).to(torch.int16)
    return nuq.packed(codes, rules.keys.bits), counts, channel.to(torch.int16), exact


def _encoded_values(v: Tensor, rules: Rules) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    flat = v.flatten(1)
    least, most, channels = value_bounds(flat, rules.outliers)
    norm = _half_precision(torch.cat([(most + least) / 2, (most - least) / 2], 1))
    middle, half = norm.float()[:, :, None].unbind(1)
    codes = nuq.nearest(_normalised(flat, middle, half), rules.values).view(v.shape)
    exact = _half_precision(flat.gather(1, channels))
    return nuq.packed(codes, rules.values.bits), norm, channels.to(torch.int16), exact


def _normalised(x: Tensor, middle: Tensor, half: Tensor) -> Tensor:
    """(x - middle) / half; where nothing varies, whatever: the code stands for `middle` then."""
    return (x - middle) / torch.where(half == 0, torch.ones_like(half), half)


def _half_precision(x: Tensor) -> Tensor:
    return x.clamp(-LARGEST, LARGEST).half()
