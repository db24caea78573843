"""Page scores by metadata in int8: the reference's numbers, still a bound, and no coarser than its
steps."""

from __future__ import annotations

import math

import pytest
import torch
from pools import CASES, TOLERANCE, Case, Pool, close, name, shared
from torch import Tensor

from quest_dist import on_cuda, ops, reference
from quest_dist.arguments import Arguments
from quest_dist.metadata import LARGEST, Int8Metadata, decoded, encoded, fitted

all_cases = pytest.mark.parametrize("case", CASES, ids=name)
some_cases = pytest.mark.parametrize(
    "case", [c for c in CASES if c.group in (3, 8) and c.page_size in (1, 16)], ids=name
)


@pytest.fixture(params=ops.isas(), autouse=True)
def every_isa(request: pytest.FixtureRequest) -> object:
    """int8 is scored on a CPU only."""
    before = ops.isa()
    ops.set_isa(request.param)
    yield request.param
    ops.set_isa(before)


def in_int8(pool: Pool, page_size: int) -> Int8Metadata:
    """A pool's metadata in int8, each row's by the pages that it has closed; the rest is noise."""
    rest = pool.meta.shape[1:]
    rows = len(pool.lengths)
    meta = Int8Metadata(
        torch.full(pool.meta.shape, 77, dtype=torch.int8),
        torch.full((rows, *rest), math.nan),
        torch.full((rows, *rest), math.nan),
    )
    for r, length in enumerate(pool.lengths.tolist()):
        ids = pool.table[r, : (length - 1) // page_size].long()
        if len(ids):
            meta.scale[r], meta.offset[r] = fitted(pool.meta[ids])
            meta.codes[ids] = encoded(pool.meta[ids], meta.scale[r], meta.offset[r])
    return meta


@all_cases
@pytest.mark.parametrize("reduce", ops.REDUCTIONS)
def test_scores_are_the_references(case: Case, reduce: ops.Reduce) -> None:
    pool, q = shared(case)
    meta = in_int8(pool, case.page_size)
    for radius_scale, score_open in ((1.0, False), (0.5, True)):
        how = (radius_scale, reduce, score_open)
        got = ops.page_scores(q, pool.kv, meta, pool.table, pool.lengths, *how)
        wide = (q.double(), pool.kv.double(), meta, pool.table, pool.lengths)
        assert close(got, reference.page_scores(*wide, *how))


@some_cases
def test_the_score_is_a_bound_and_a_step_of_each_channel_above_it_at_most(case: Case) -> None:
    pool, q = shared(case)
    meta = in_int8(pool, case.page_size)
    got = ops.page_scores(q, pool.kv, meta, pool.table, pool.lengths)
    exact = ops.page_scores(q, pool.kv, pool.meta, pool.table, pool.lengths)
    seen = exact.isfinite()
    assert torch.equal(got.isfinite(), seen)
    room = TOLERANCE["sum"] * exact[seen].abs().max()
    assert (got[seen] >= exact[seen] - room).all()
    step = meta.scale.amax(dim=2).repeat_interleave(case.group, 1)  # [R, H, D]
    most = (q.float().abs() * step).sum(-1, keepdim=True).expand_as(exact)
    assert (got[seen] <= (exact + most)[seen] + room).all()
    tokens = ops.token_scores(q, pool.kv, pool.table, pool.lengths, scale=1.0)
    missing = got.shape[2] * case.page_size - tokens.shape[2]
    padded = torch.nn.functional.pad(tokens, (0, missing), value=-math.inf)
    best = padded.view(*got.shape, case.page_size).amax(dim=-1)
    assert (got[seen] >= best[seen] - room).all()


@some_cases
def test_neither_threads_nor_neighbours_change_a_bit(case: Case) -> None:
    pool, q = shared(case)
    meta = in_int8(pool, case.page_size)
    ops.set_threads(1)
    one = ops.page_scores(q, pool.kv, meta, pool.table, pool.lengths)
    ops.set_threads(3)
    try:
        assert torch.equal(ops.page_scores(q, pool.kv, meta, pool.table, pool.lengths), one)
    finally:
        ops.set_threads(None)
    for r in range(len(case.lengths)):
        row = slice(r, r + 1)
        own = Int8Metadata(meta.codes, meta.scale[row], meta.offset[row])
        alone = ops.page_scores(q[row], pool.kv, own, pool.table[row], pool.lengths[row])
        assert torch.equal(alone[0], one[r])
    size = case.group  # the heads of one kv head, without the other's
    half = slice(0, size)
    kv = pool.kv[:, :1].contiguous()
    own = Int8Metadata(*(part[:, :1].contiguous() for part in meta))
    few = ops.page_scores(q[:, half], kv, own, pool.table, pool.lengths)
    assert torch.equal(few, one[:, half])


def bounds_of(pages: int, seed: int, outliers: float = 0.0) -> Tensor:
    """Maxima and minima [pages, 2, 2, 32] of 16 random keys each; some channels have a mean."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(pages, 16, 2, 32, generator=generator).to(torch.bfloat16).float()
    keys[..., ::7] += outliers
    return torch.stack((keys.amax(1), keys.amin(1)), dim=2)


def test_codes_stand_for_no_less_than_the_maximum_and_no_more_than_the_minimum() -> None:
    bounds = bounds_of(300, 0, outliers=20.0)
    scale, offset = fitted(bounds[:200])
    meta = Int8Metadata(encoded(bounds, scale, offset), scale[None], offset[None])
    held = decoded(meta, 0, torch.arange(200))
    assert (held[:, :, 0] >= bounds[:200, :, 0]).all()
    assert (held[:, :, 1] <= bounds[:200, :, 1]).all()
    assert ((held - bounds[:200]).abs() <= scale).all()
    assert meta.codes[:200].abs().max() < LARGEST
    # An eighth of what the first pages span is left on each side.
    low, high = bounds[:200].amin(0), bounds[:200].amax(0)
    for value in (high + 0.12 * (high - low), low - 0.12 * (high - low)):
        assert (encoded(value[None], scale, offset).abs() <= LARGEST).all()
        one = Int8Metadata(encoded(value[None], scale, offset), scale[None], offset[None])
        beyond = decoded(one, 0, torch.tensor([0]))[0] - value
        assert (beyond[:, 0] >= 0).all()
        assert (beyond[:, 1] <= 0).all()


def test_values_beyond_the_range_saturate() -> None:
    bounds = bounds_of(50, 1)
    scale, offset = fitted(bounds)
    codes = encoded(torch.stack((bounds[0] + 100.0, bounds[0] - 100.0)), scale, offset)
    assert (codes[0] == LARGEST).all()
    assert (codes[1] == -LARGEST).all()


def test_channels_without_a_span_are_kept_exactly() -> None:
    bounds = torch.full((3, 1, 2, 4), 0.3)
    scale, offset = fitted(bounds)
    meta = Int8Metadata(encoded(bounds, scale, offset), scale[None], offset[None])
    assert torch.equal(decoded(meta, 0, torch.arange(3)).float(), bounds)


def test_one_page_leaves_room_for_what_its_keys_span() -> None:
    bounds = bounds_of(40, 2)
    scale, offset = fitted(bounds[:1])
    saturated = (encoded(bounds, scale, offset).abs() == LARGEST).float().mean()
    assert saturated < 0.02


def test_a_gpu_refuses() -> None:
    codes = Int8Metadata(*(torch.zeros(1, 1, 2, 8) for _ in range(3)))
    with pytest.raises(ValueError, match="meta is Int8Metadata; expected a tensor: int8 is scored"):
        on_cuda.page_scores(Arguments("page_scores"), *([torch.zeros(1)] * 2), codes,
                            *([torch.zeros(1)] * 2), 1.0, 0, False)  # fmt: skip
