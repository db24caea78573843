"""Pages, reference counts and copy on write."""

from __future__ import annotations

import pytest
import torch

from quest_dist.pool import Geometry, Pool, Rows

SHAPE = Geometry(layers=2, heads=2, kv_heads=1, head_dim=8, dtype=torch.float32)


def filled(tokens: int, page_size: int = 4, seed: int = 0) -> tuple[Rows, torch.Tensor]:
    """One row of random tokens, the same in both layers, and its keys [1, 1, L, D]."""
    rows = Rows(Pool(SHAPE, page_size, 2), 1)
    keys = torch.randn(1, 1, tokens, 8, generator=torch.Generator().manual_seed(seed))
    rows.extend([tokens])
    for layer in range(2):
        rows.append(layer, keys, -keys)
    return rows, keys


def grow(rows: Rows, value: float) -> None:
    """One more token in every row, at `value` plus its row number."""
    rows.extend([1] * len(rows))
    new = value + torch.arange(len(rows)).float()[:, None, None, None].expand(-1, 1, 1, 8)
    for layer in range(2):
        rows.append(layer, new.contiguous(), new.contiguous())


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 11, 33])
def test_what_was_appended_comes_back(tokens: int) -> None:
    rows, keys = filled(tokens)
    for layer in range(2):
        k, v = rows.gather(layer, 0)
        assert torch.equal(k, keys)
        assert torch.equal(v, -keys)


@pytest.mark.parametrize("tokens", [4, 6])
def test_forked_rows_share_whole_pages_and_write_in_their_own(tokens: int) -> None:
    rows, keys = filled(tokens)
    used = rows.pool.pages - rows.pool.free_pages
    forks = rows.fork(0, 3)
    assert rows.pool.pages - rows.pool.free_pages == used
    grow(forks, 10.0)
    assert rows.pool.pages - rows.pool.free_pages == used + 3
    for row in range(3):
        k, _ = forks.gather(1, row)
        assert torch.equal(k[:, :, :tokens], keys)
        assert torch.equal(k[0, 0, tokens], torch.full((8,), 10.0 + row))
    assert torch.equal(rows.gather(0, 0)[0], keys)


def test_the_last_holder_writes_without_a_copy() -> None:
    rows, _ = filled(6)
    forks = rows.fork(0, 1)
    rows.keep([])
    before = forks.page_table.clone()
    grow(forks, 1.0)
    assert torch.equal(forks.page_table, before)


def test_rows_that_leave_free_their_pages() -> None:
    rows, _ = filled(6)
    forks = rows.fork(0, 3)
    for step in range(9):
        grow(forks, float(step))
    kept = forks.gather(0, 1)[0].clone()
    held = rows.pool.pages - rows.pool.free_pages
    forks.keep([1])
    assert rows.pool.pages - rows.pool.free_pages < held
    assert torch.equal(forks.gather(0, 0)[0], kept)
    forks.keep([])
    rows.keep([])
    assert rows.pool.free_pages == rows.pool.pages


def test_the_pool_grows_and_keeps_its_content() -> None:
    rows, keys = filled(6)
    before = rows.pool.pages
    grow(rows.fork(0, 9), 3.0)
    assert rows.pool.pages > before
    assert torch.equal(rows.gather(1, 0)[0], keys)


def test_a_sliding_window_is_a_limit() -> None:
    shape = Geometry(1, 1, 1, 8, torch.float32, window=8)
    rows = Rows(Pool(shape, 4, 1), 1)
    rows.extend([8])
    with pytest.raises(ValueError, match="sequence of 9 tokens"):
        rows.extend([1])


def test_page_size_is_checked() -> None:
    with pytest.raises(ValueError, match="page_size=0"):
        Pool(SHAPE, 0, 1)
