"""Non-uniform quantisation: numbers by the nearest of 2^b centroids, as codes of b bits, packed.

Eight codes fill b bytes: code i of a group takes bits [b i, b (i + 1)) of its bytes, least first. A
row of codes is padded to a whole group.

Packed codes become numbers by looking up a few codes at once: a *stretch* of 8 bits (12 where b is
3) names 4 or 2 centroids together, so a codebook carries a table of all stretches.

Invariant: `unpacked(packed(codes))` are the codes, and `looked_up(packed(codes))` the centroids
that they name, bit for bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BITS = (2, 3, 4)
GROUP = 8


class Codebook(NamedTuple):
    """`centroids` fp32 [2^b], ascending, by which codes are chosen, and `table`, fp32
    [2^stretch, stretch / b], what stretches of packed codes stand for."""

    bits: int
    centroids: Tensor
    table: Tensor

    @classmethod
    def of(cls, bits: int, centroids: Tensor, meanings: Tensor) -> Codebook:
        """A codebook whose codes are chosen by `centroids` and stand for `meanings`, [2^b] each."""
        width = _stretch(bits)
        stretches = torch.arange(1 << width, device=centroids.device)
        shifts = torch.arange(0, width, bits, device=centroids.device)
        codes = (stretches[:, None] >> shifts) & (1 << bits) - 1
        return cls(bits, centroids.float(), meanings.float()[codes])


def _stretch(bits: int) -> int:
    """Bits that are looked up at once: whole codes, of whole bytes or half a group's."""
    return 12 if bits == 3 else 8


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of a row of `count` codes."""
    return -(-count // GROUP) * bits


def nearest(x: Tensor, codebook: Codebook) -> Tensor:
    """The codes, int32 of x's shape, of the nearest centroids; the lower one at equal distance."""
    centroids = codebook.centroids
    middles = (centroids[1:] + centroids[:-1]) / 2
    return torch.bucketize(x.contiguous(), middles, out_int32=True)


def packed(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., n] as uint8 [..., packed_bytes(n, bits)]."""
    groups = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % GROUP)).long()
    groups = groups.unflatten(-1, (-1, GROUP))
    places = torch.arange(GROUP, device=codes.device)
    words = (groups << bits * places).sum(-1, keepdim=True)
    return (words >> 8 * places[:bits] & 255).to(torch.uint8).flatten(-2)


def unpacked(rows: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of packed rows uint8 [..., B], int32 [..., count]."""
    places = torch.arange(GROUP, device=rows.device)
    words = (rows.unflatten(-1, (-1, bits)).long() << 8 * places[:bits]).sum(-1, keepdim=True)
    codes = words >> bits * places & (1 << bits) - 1
    return codes.flatten(-2)[..., :count].int()


def looked_up(rows: Tensor, codebook: Codebook, count: int) -> Tensor:
    """What the first `count` codes of packed rows uint8 [..., B] stand for, fp32 [..., count]."""
    stretches = rows.int()
    if codebook.bits == 3:
        first, second, third = stretches.unflatten(-1, (-1, 3)).unbind(-1)
        stretches = torch.stack([first | (second & 15) << 8, second >> 4 | third << 4], -1)
        stretches = stretches.flatten(-2)
    numbers = torch.nn.functional.embedding(stretches, codebook.table)
    return numbers.flatten(-2)[..., :count]
