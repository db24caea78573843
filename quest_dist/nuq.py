"""Non-uniform quantisation: numbers by the nearest of 2^b centroids."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BITS = (2, 3, 4)


class Codebook(NamedTuple):
    """`centroids` fp32 [2^b], ascending, by which codes are chosen, and `meanings` [2^b], what
    these stand for."""

    centroids: Tensor
    meanings: Tensor

    @property
    def bits(self) -> int:
        """Of a code."""
        return len(self.centroids).bit_length() - 1


def nearest(x: Tensor, codebook: Codebook) -> Tensor:
    """The codes, int32 of x's shape, of the nearest centroids; the lower one at equal distance."""
    centroids = codebook.centroids
    middles = (centroids[1:] + centroids[:-1]) / 2
    return torch.bucketize(x.contiguous(), middles, out_int32=True)
