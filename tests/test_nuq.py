"""Codes of few bits: packing loses nothing, and codes name the nearest centroids."""

from __future__ import annotations

import pytest
import torch

from quest_dist import nuq
from quest_dist.nuq import BITS, Codebook


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def codebook(bits: int) -> Codebook:
    centroids = random(1 << bits, seed=bits).sort().values
    return Codebook.of(bits, centroids, centroids)


@pytest.mark.parametrize("count", [1, 7, 8, 20, 64])
@pytest.mark.parametrize("bits", BITS)
def test_packing_is_a_bijection_in_as_few_bytes_as_it_says(bits: int, count: int) -> None:
    codes = torch.randint(0, 1 << bits, (5, 3, count), generator=torch.Generator().manual_seed(1))
    rows = nuq.packed(codes, bits)
    assert rows.dtype == torch.uint8
    assert rows.shape == (5, 3, nuq.packed_bytes(count, bits))
    assert nuq.packed_bytes(64, bits) == 64 * bits // 8
    assert torch.equal(nuq.unpacked(rows, bits, count), codes.int())


@pytest.mark.parametrize("bits", BITS)
def test_codes_lie_least_first(bits: int) -> None:
    codes = torch.arange(8) % (1 << bits)
    number = sum(int(code) << bits * place for place, code in enumerate(codes))
    assert bytes(nuq.packed(codes, bits).tolist()) == number.to_bytes(bits, "little")


@pytest.mark.parametrize("count", [5, 16, 24])
@pytest.mark.parametrize("bits", BITS)
def test_stretches_look_up_what_single_codes_name(bits: int, count: int) -> None:
    chosen, meanings = random(1 << bits).sort().values, random(1 << bits, seed=9)
    book = Codebook.of(bits, chosen, meanings)
    codes = torch.randint(0, 1 << bits, (7, count), generator=torch.Generator().manual_seed(2))
    assert torch.equal(nuq.looked_up(nuq.packed(codes, bits), book, count), meanings[codes])


@pytest.mark.parametrize("bits", BITS)
def test_codes_name_the_nearest_centroids(bits: int) -> None:
    book, x = codebook(bits), 2 * random(40, 9, seed=3)
    expected = (x[..., None] - book.centroids).abs().argmin(-1)
    assert torch.equal(nuq.nearest(x, book), expected.int())


def test_equal_distance_goes_down_and_ends_hold_what_lies_beyond() -> None:
    centroids = torch.tensor([-1.0, 0.0, 0.5, 1.0])
    book = Codebook.of(2, centroids, centroids)
    x = torch.tensor([-9.0, -0.5, 0.25, 0.75, 9.0])
    assert nuq.nearest(x, book).tolist() == [0, 0, 1, 2, 3]
