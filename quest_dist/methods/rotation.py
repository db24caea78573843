"""Rotary embedding of many tokens at once, forth to their positions and back, in fp32.

The angles are read off what the model's own embedding makes of one vector at every position, once,
and are the same for all layers and heads. Halves of a head are turned against each other, as
`View.rotate` does it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Rotate = Callable[[Tensor, Tensor], Tensor]


class Rotation:
    """Cosines and sines, fp32 [positions, D / 2] each, for as many positions as were asked for."""

    def __init__(self) -> None:
        self._cos = self._sin = torch.empty(0, 0)

    def forth(self, x: Tensor, rotate: Rotate, start: int) -> Tensor:
        """x fp32 [n, heads, D] turned to positions start, start + 1, ..."""
        cos, sin = self._angles(x, rotate, start)
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def back(self, x: Tensor, rotate: Rotate, start: int) -> Tensor:
        """x fp32 [n, heads, D] as it was before it was turned to these positions."""
        cos, sin = self._angles(x, rotate, start)
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos + second * sin, second * cos - first * sin], -1)

    def _angles(self, x: Tensor, rotate: Rotate, start: int) -> tuple[Tensor, Tensor]:
        end = start + x.shape[0]
        if self._cos.shape[0] < end:
            one = torch.zeros(end, 1, x.shape[-1], device=x.device)
            one[..., : x.shape[-1] // 2] = 1.0
            turned = rotate(one, torch.arange(end, dtype=torch.int32, device=x.device))
            self._cos, self._sin = turned.chunk(2, dim=-1)
        return self._cos[start:end], self._sin[start:end]
