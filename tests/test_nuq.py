"""Codes name the nearest centroids."""

from __future__ import annotations

import pytest
import torch

from quest_dist import nuq
from quest_dist.nuq import BITS, Codebook


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def codebook(bits: int) -> Codebook:
    centroids = random(1 << bits, seed=bits).sort().values
    return Codebook(centroids, centroids)


@pytest.mark.parametrize("bits", BITS)
def test_codes_name_the_nearest_centroids(bits: int) -> None:
    book, x = codebook(bits), 2 * random(40, 9, seed=3)
    expected = (x[..., None] - book.centroids).abs().argmin(-1)
    assert torch.equal(nuq.nearest(x, book), expected.int())


def test_equal_distance_goes_down_and_ends_hold_what_lies_beyond() -> None:
    centroids = torch.tensor([-1.0, 0.0, 0.5, 1.0])
    book = Codebook(centroids, centroids)
    x = torch.tensor([-9.0, -0.5, 0.25, 0.75, 9.0])
    assert nuq.nearest(x, book).tolist() == [0, 0, 1, 2, 3]
