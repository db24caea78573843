"""Attention straight from KVQuant's blocks: codes before rotation, outliers, sinks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pools import Case, close, filled_pool, queries, random_lists
from test_packed import case_name, case_of, same_alone
from torch import Tensor

from quest_dist import ops, packing, reference_packed
from quest_dist.nuq import BITS
from quest_dist.packed import GPU_STEP
from quest_dist.packing import TILE, Layout, Nuq, Packed

SINKS = 3


def rotation(positions: int, dim: int) -> tuple[Tensor, Tensor]:
    """The tables of rotary embeddings, fp32 [positions, dim / 2] each."""
    speed = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) * 2 / dim)
    angles = torch.arange(positions)[:, None] * speed
    return angles.cos().float(), angles.sin().float()


def filled(case: Case, bits: int, share: float = 0.02) -> tuple[Any, Tensor, Packed]:
    """The case's rows, all but the first of them packed, in shuffled blocks of random codes with
    random outliers; the pool's own keys and values are others."""
    pool, q = filled_pool(case), queries(case)
    draw = torch.Generator().manual_seed(bits)
    ends = torch.tensor([0, *case.lengths[1:]], dtype=torch.int32)
    width = -(-max(case.lengths) // TILE)
    rows, heads, dim = len(case.lengths), case.kv_heads, case.head_dim
    count = rows * width + 2
    layout = Layout(bits, TILE, dim, nuq=True)
    blocks = torch.randint(
        256, (count, heads, layout.bytes), generator=draw, dtype=torch.uint8
    ).contiguous()
    table = torch.randperm(count, generator=draw)[: rows * width].view(rows, width).int()
    chosen = torch.rand(count, 2 * heads, TILE * dim, generator=draw) < share
    starts = torch.cat([torch.zeros(1), chosen.sum(2).flatten().cumsum(0)]).int()
    starts = torch.stack([starts[i * 2 * heads : (i + 1) * 2 * heads + 1] for i in range(count)])
    places = chosen.nonzero()[:, 2]
    off = (4 * torch.randn(len(places), generator=draw)).half().view(torch.int16)
    nuq = Nuq(
        torch.rand(heads, 2, dim, generator=draw) + 0.2,
        torch.rand(count, 2, TILE, generator=draw).half(),
        starts,
        torch.stack([places.to(torch.int16), off], 1),
        *rotation(max(case.lengths), dim),
        SINKS,
    )
    levels = torch.randn(2, 1 << bits, generator=draw).sort(1).values
    return pool, q, Packed(blocks, table, ends, ends.clone(), levels, TILE, nuq)


CASES = [
    *(case_of(dtype, group) for dtype in (torch.float32, torch.bfloat16) for group in (1, 3, 4, 8)),
    *(case_of(torch.bfloat16, 4, dim) for dim in (8, 24, 96, 128)),
    *(case_of(torch.bfloat16, 2, 64, size) for size in (1, 8, 32)),
]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_attention_is_that_over_what_the_codes_stand_for(isa: str, case: Case, bits: int) -> None:
    if isa == "cuda" and case.head_dim % GPU_STEP:
        pytest.skip("a GPU takes heads of a multiple of 16 channels")
    pool, q, packed = filled(case, bits)
    for lists, unit in ((0, "pages"), (1, "pages"), (case.heads, "tokens")):
        index, count = random_lists(case, lists, unit) if lists else (None, None)
        place = (packed, pool.table, pool.lengths, index, count, unit)
        got = ops.attend_packed(q, pool.kv, *place)
        want = reference_packed.attend(q.double(), pool.kv.double(), *place)
        assert torch.equal(got.attended, want.attended)
        assert torch.equal(got.read, want.read)
        folded = case.dtype == torch.bfloat16
        assert close(got.lse, want.lse, "packed bf16" if folded else "sum")
        assert close(got.out, want.out, "nuq bf16" if folded else case.dtype)


@pytest.mark.parametrize("bits", BITS)
def test_the_reference_reads_what_was_written(bits: int) -> None:
    """By hand: one token's key and value, turned, with its outliers."""
    case = case_of(torch.float32, 1, 16)
    pool, _, packed = filled(case, bits, 0.2)
    nuq = packed.nuq
    assert nuq is not None
    row, token, head = 4, 21, 1
    own, table = reference_packed.dense(packed, pool.kv, pool.table, pool.lengths)
    got = own[table[row, token // 16], head, :, token % 16]
    number, at = int(packed.table[row, token // TILE]), token % TILE
    layout = packed.layout(16)
    for of in range(2):
        codes = packing.get_codes(packed.blocks[number, head], layout, 0, values=of == 1)[at]
        x = packed.levels[of].double()[codes]
        if of == 0:
            x = torch.cat([x[0::2], x[1::2]]) * nuq.keys[head, 0] + nuq.keys[head, 1]
        else:
            x = x * nuq.values[number, 1, at] + nuq.values[number, 0, at]
        first, last = nuq.starts[number, of * case.kv_heads + head :][:2].tolist()
        added = 0
        for place, half in nuq.outliers[first:last].tolist():
            if place // 16 == at:
                x[place % 16] += float(torch.tensor(half, dtype=torch.int16).view(torch.float16))
                added += 1
        assert added
        if of == 0:
            turn = torch.complex(nuq.cos[token], nuq.sin[token]).to(torch.complex128)
            turned = torch.complex(x[:8], x[8:]) * turn
            x = torch.cat([turned.real, turned.imag])
        assert torch.allclose(got[of].double(), x, rtol=1e-6, atol=1e-9)


def test_codes_come_back_as_tile_bytes_has_put_them() -> None:
    for bits in BITS:
        for dim in (8, 16, 24, 64, 128):
            layout = Layout(bits, TILE, dim, nuq=True)
            vectors = torch.randint(0, 1 << bits, (layout.vectors, 32))
            tile = packing.tile_bytes_of(vectors, bits)
            assert tile.shape == (layout.tile_bytes,)
            block = torch.cat([tile, tile])
            codes = packing.get_codes(block, layout, 0, values=False)
            pairs = vectors[: dim // 2].view(-1, TILE, 2)
            assert torch.equal(codes, pairs.transpose(0, 1).reshape(TILE, dim))


def test_no_outliers_and_no_sinks(isa: str) -> None:
    case = case_of(torch.bfloat16, 4, 128)
    pool, q, packed = filled(case, 3, 0.0)
    assert packed.nuq is not None
    assert packed.nuq.outliers.shape == (0, 2)
    packed = packed._replace(nuq=packed.nuq._replace(sinks=0))
    place = (packed, pool.table, pool.lengths)
    want = reference_packed.attend(q.double(), pool.kv.double(), *place)
    assert close(ops.attend_packed(q, pool.kv, *place).out, want.out, "nuq bf16")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sinks_alone_are_attend(isa: str, dtype: torch.dtype) -> None:
    case = case_of(dtype)
    pool, q, packed = filled(case, 4)
    assert packed.nuq is not None
    everything = packed._replace(nuq=packed.nuq._replace(sinks=10**6))
    got = ops.attend_packed(q, pool.kv, everything, pool.table, pool.lengths)
    want = ops.attend(q, pool.kv, pool.table, pool.lengths)
    assert close(got.out, want.out.double(), dtype)
    assert torch.equal(got.out[0], want.out[0])  # of which nothing is packed


@pytest.mark.parametrize("lists", [0, 2])
def test_bits_depend_on_neither_threads_nor_neighbours(isa: str, lists: int) -> None:
    case = case_of(torch.bfloat16, 4, 128)
    pool, q, packed = filled(case, 3)
    index, count = random_lists(case, lists, "pages") if lists else (None, None)
    assert same_alone(pool, q, packed, (pool.table, pool.lengths, index, count))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"group": 32}, "packed is group=32: a block of nuq codes holds 16 tokens; expected"),
        ({"keys": 300}, r"packed.keys\[0\] is 300; expected a multiple of 1 in 0..1"),
        ({"sinks": -1}, "packed.nuq.sinks is -1; expected 0 or more tokens"),
        ({"starts": -5}, r"packed.nuq.starts of block \d+ name outliers -5"),
        (
            {"starts": 10**6},
            r"packed.nuq.starts of block \d+ name outliers 1000000",
        ),
        ({"outliers": 16 * 64}, r"packed.nuq.outliers\[\d+\] is at 1024 of a block's 1024 numbers"),
        ({"cos": torch.zeros(257, 16)}, r"packed.nuq.\w+ is of shape \[257, 32\]; expected"),
        (
            {"cos": torch.zeros(100, 32), "sin": torch.zeros(100, 32)},
            r"packed.keys\[\d\] is 257; expected a multiple of 1 in 0..100",
        ),
        ({"keys_": torch.zeros(2, 2, 64).half()}, "packed.nuq.keys is torch.float16; expected"),
        ({"values_": torch.zeros(2, 2, 16).half()}, r"packed.nuq.values is of shape \[2, 2, 16\]"),
    ],
)
def test_wrong_blocks_are_named(change: dict[str, Any], said: str) -> None:
    pool, q, packed = filled(case_of(torch.float32), 4)
    nuq = packed.nuq
    assert nuq is not None
    for name, value in change.items():
        if name in ("group", "keys"):
            whole = value if name == "group" else torch.full_like(packed.keys, value)
            packed = packed._replace(**{name: whole})
        else:
            held = getattr(nuq, name.removesuffix("_"))
            one = torch.full_like(held, value) if name in ("starts", "outliers") else value
            nuq = nuq._replace(**{name.removesuffix("_"): one})
            packed = packed._replace(nuq=nuq)
    with pytest.raises(ValueError, match=f"attend_packed: {said}"):
        ops.attend_packed(q, pool.kv, packed, pool.table, pool.lengths)


@pytest.mark.parametrize("start", [-5, 10**6])
def test_places_of_outliers_that_are_not_there_are_never_followed(isa: str, start: int) -> None:
    pool, q, packed = filled(case_of(torch.float32), 4)
    nuq = packed.nuq
    assert nuq is not None
    wrong = packed._replace(nuq=nuq._replace(starts=torch.full_like(nuq.starts, start)))
    with pytest.raises(ValueError, match=rf"attend_packed: packed\.nuq\.starts.* {start}"):
        ops.attend_packed(q, pool.kv, wrong, pool.table, pool.lengths)


def test_its_blocks_are_not_written_by_pack() -> None:
    pool, _, packed = filled(case_of(torch.float32), 4)
    with pytest.raises(ValueError, match=r"pack: packed\.nuq is given; expected None"):
        ops.pack(packed, pool.kv, pool.table, packed.keys, packed.values)


def test_the_reference_keeps_what_is_not_packed() -> None:
    case = case_of(torch.float32)
    pool, _, packed = filled(case, 4)
    half = packed._replace(keys=packed.keys // 2, values=packed.values // 3)
    own, table = reference_packed.dense(half, pool.kv, pool.table, pool.lengths)
    row, length = len(case.lengths) - 1, case.lengths[-1]
    for of, end in enumerate((length // 2, length // 3)):
        page, slot = divmod(end, 16)
        got, had = own[table[row, page], :, of, slot], pool.kv[pool.table[row, page], :, of, slot]
        assert torch.equal(got, had)
        assert not math.isnan(float(got.sum()))
