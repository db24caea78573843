"""Page metadata in eight bits: half the bytes of bf16 (a quarter of fp32) that scoring reads.

A page keeps, per kv head and channel, one int8 code for the maximum of its keys and one for the
minimum. Code n stands for offset + scale n; scale and offset belong to a row and are fixed once,
from the first pages that the row closed, for maxima and minima apart.

Invariants:
  - maxima round up and minima down, so the decoded page holds every key and its score is still an
    upper bound of q.k (at radius_scale 1), for every value within the range that was fixed;
  - that range is what the first pages span and MARGIN of it more on both sides. A page that closes
    later and lies beyond saturates: the end of the range stands for its value, and its score may
    then fall below the bound by |q| times the excess of those channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: Codes run from -LARGEST to LARGEST, and scales are no smaller than SMALLEST.
LARGEST = 127
SMALLEST = 2.0**-64
#: Room for pages that close later, on each side, in parts of what the first pages span.
MARGIN = 0.125


class Int8Metadata(NamedTuple):
    """What ops.page_scores takes as metadata in int8; its letters are those of `ops`.

    `codes` int8 [N, G, 2, D] hold a page's maximum and minimum, `scale` and `offset` fp32
    [R, G, 2, D] say what they stand for in each row.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor


def decoded(meta: Tensor | Int8Metadata, row: int, pages: Tensor) -> Tensor:
    """Maxima and minima of the pages with these ids, as a row reads them: [pages, G, 2, D], fp64
    where they are made of codes."""
    if isinstance(meta, Tensor):
        return meta[pages]
    codes = meta.codes[pages].double()
    return codes * meta.scale[row].double() + meta.offset[row].double()


def fitted(bounds: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and offset, fp32 [..., G, 2, D], for pages [..., pages, G, 2, D] and some beyond.

    Scales are powers of two: weights in bf16 stay so with the scale in them, and meet the codes two
    a lane where a processor multiplies bf16 in pairs.

    Few pages say little about the next: a channel gets the room of twice what its keys span over
    the number of pages, and of a quarter of it at least.
    """
    exact = bounds.double()
    low, high = exact.amin(dim=-4), exact.amax(dim=-4)
    keys = high[..., :1, :] - low[..., 1:, :]
    span = torch.maximum(high - low, keys * max(0.25, 2.0 / bounds.shape[-4]))
    offset = ((low + high) / 2).float()
    half = span * (0.5 + MARGIN) + (offset - (low + high) / 2).abs()
    _, exponent = torch.frexp((half / LARGEST).clamp(min=SMALLEST))
    return torch.ldexp(torch.ones_like(offset), exponent), offset


def encoded(bounds: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """Codes int8 of pages' maxima and minima [..., G, 2, D], rounded outward and saturating."""
    steps = (bounds.double() - offset.double()) / scale.double()
    steps[..., 0, :].ceil_()
    steps[..., 1, :].floor_()
    return steps.clamp(-LARGEST, LARGEST).to(torch.int8)
