"""Rotary embedding of many tokens at once, undone, and its tables for kernels that do it, in fp32.

The angles are read off what the model's own embedding makes of one vector at every position, once,
and are the same for all layers and heads. Halves of a head are turned against each other, as
`View.rotate` does it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Rotate = Callable[[Tensor, Tensor], Tensor]
#: Positions whose angles are read off together.
AT_ONCE = 512


class Rotation:
    """Cosines and sines, fp32 [positions, D / 2] each, for as many positions as were asked for."""

    def __init__(self) -> None:
        self._cos = self._sin = torch.empty(0, 0)

    def back(self, x: Tensor, rotate: Rotate, start: int) -> Tensor:
        """x fp32 [n, heads, D] as it was before it was turned to positions start, start + 1, ..."""
        end = start + x.shape[0]
        cos, sin = (one[start:end, None] for one in self.tables(rotate, end, x))
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos + second * sin, second * cos - first * sin], -1)

    def tables(self, rotate: Rotate, positions: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of `positions` positions or more, for heads as `like` [..., D] has
        them, where it is."""
        if self._cos.shape[0] < positions:
            count, dim = -(-positions // AT_ONCE) * AT_ONCE, like.shape[-1]
            one = torch.zeros(count, 1, dim, device=like.device)
            one[..., : dim // 2] = 1.0
            turned = rotate(one, torch.arange(count, dtype=torch.int32, device=like.device))
            self._cos, self._sin = (half.contiguous() for half in turned[:, 0].chunk(2, dim=-1))
        return self._cos, self._sin
