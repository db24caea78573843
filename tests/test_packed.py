"""Packed keys and values: the format, the codes, and attention on every instruction set."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pools import Case, close, filled_pool, queries, random_lists
from torch import Tensor

from quest_dist import ops, reference_packed
from quest_dist.packing import BITS, Layout, Packed, get_codes, put_codes, quantised, uniform

RESIDUAL = 64


def case_of(dtype: torch.dtype, group: int = 4, head_dim: int = 64, page_size: int = 16) -> Case:
    return Case(dtype, group, page_size, head_dim)


def empty_packed(case: Case, bits: int, group: int, residual: int = RESIDUAL) -> Packed:
    """Room for the packed tokens of the case's rows, in shuffled blocks that are full of junk."""
    keys = [length // residual * residual for length in case.lengths]
    values = [max(0, length - residual) for length in case.lengths]
    width = max(1, *(-(-end // group) for end in (*keys, *values)))
    rows, layout = len(keys), Layout(bits, group, case.head_dim)
    random = torch.Generator().manual_seed(3)
    count = rows * width + 2
    blocks = torch.zeros(count, case.kv_heads, layout.bytes, dtype=torch.uint8)
    codes = blocks[:, :, layout.key_codes :]
    codes.copy_(torch.randint(256, codes.shape, generator=random, dtype=torch.uint8))
    table = torch.randperm(count, generator=random)[: rows * width].view(rows, width).int()
    ends = (torch.tensor(one, dtype=torch.int32) for one in (keys, values))
    return Packed(blocks, table, *ends, uniform(bits), group)


def nothing(packed: Packed) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(packed.keys), torch.zeros_like(packed.values)


def filled(case: Case, bits: int, group: int = 32, residual: int = RESIDUAL) -> Any:
    pool, q = filled_pool(case), queries(case)
    packed = empty_packed(case, bits, group, residual)
    ops.pack(packed, pool.kv, pool.table, *nothing(packed))
    return pool, q, packed


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("dim", [8, 16, 64, 128])
@pytest.mark.parametrize("bits", BITS)
def test_codes_come_back_as_they_were_put(bits: int, dim: int, values: bool) -> None:
    layout = Layout(bits, 32, dim)
    block = torch.zeros(layout.bytes, dtype=torch.uint8)
    random = torch.Generator().manual_seed(bits)
    tiles = torch.randint(2**bits, (2, 16, dim), generator=random)
    for number, codes in enumerate(tiles):
        put_codes(block, layout, number, codes, values=values)
        put_codes(block, layout, number, codes.flip(0), values=not values)
    for number, codes in enumerate(tiles):
        assert torch.equal(get_codes(block, layout, number, values=values), codes)
        assert torch.equal(get_codes(block, layout, number, values=not values), codes.flip(0))


@pytest.mark.parametrize("group", [16, 32, 64])
@pytest.mark.parametrize("bits", BITS)
def test_a_block_weighs_what_the_formula_says(bits: int, group: int) -> None:
    for dim in (64, 128):
        width = min(group, dim)
        formula = group * dim * (2 * bits + 32 / group + 32 / width) / 8
        assert Layout(bits, group, dim).bytes == formula


@pytest.mark.parametrize("bits", BITS)
def test_rounding_is_off_by_half_a_step_at_most_and_stays_where_it_is(bits: int) -> None:
    x = torch.randn(500, 32, generator=torch.Generator().manual_seed(1)) * 3 + 1
    codes, scale, minimum = quantised(x, bits, 1)
    back = codes * scale.float() + minimum.float()
    slack = minimum.float().abs() * 2**-11 + scale.float() * 2**bits * 2**-11
    assert bool(((x - back).abs() <= scale.float() / 2 * 1.01 + slack).all())
    again, *kept = quantised(back, bits, 1)
    assert torch.equal(again, codes)
    assert all(torch.equal(a, b) for a, b in zip(kept, (scale, minimum), strict=True))


def test_half_a_step_goes_to_the_even_code() -> None:
    codes, scale, minimum = quantised(torch.tensor([[0.0, 1.0, 2.0, 6.0]]), 2, 1)
    assert codes.tolist() == [[0, 0, 1, 3]]
    assert (scale.item(), minimum.item()) == (2.0, 0.0)


@pytest.mark.parametrize("bits", BITS)
def test_groups_of_one_or_two_values_are_exact(bits: int) -> None:
    steps = float(2**bits - 1)
    x = torch.tensor([[-1.0, steps - 1] * 16, [0.25] * 32, [0.0] * 32])
    codes, scale, minimum = quantised(x, bits, 1)
    assert torch.equal(codes * scale.float() + minimum.float(), x)


def test_huge_values_stay_finite() -> None:
    codes, scale, minimum = quantised(torch.tensor([[-1e30, 1e30, 0.0, 1.0]]), 4, 1)
    assert bool((codes * scale.float() + minimum.float()).isfinite().all())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pack_writes_the_bits_of_the_reference(isa: str, dtype: torch.dtype, bits: int) -> None:
    case = case_of(dtype, page_size=8)
    pool, _, packed = filled(case, bits)
    expected = empty_packed(case, bits, 32)
    reference_packed.pack(expected, pool.kv, pool.table, *nothing(expected))
    assert torch.equal(packed.blocks, expected.blocks)


def test_packing_in_steps_is_packing_at_once(isa: str) -> None:
    case = case_of(torch.bfloat16)
    pool, _, packed = filled(case, 4)
    steps = empty_packed(case, 4, 32)
    done = list(nothing(steps))
    for part in (1, 2, 3, 4):
        ends = (steps.keys * part // 4 // 32 * 32, steps.values * part // 4)
        ops.pack(steps._replace(keys=ends[0], values=ends[1]), pool.kv, pool.table, *done)
        done = list(ends)
    assert torch.equal(steps.blocks, packed.blocks)


def test_one_huge_channel_of_keys_or_token_of_values_disturbs_no_other() -> None:
    case = case_of(torch.float32)
    pool, _, packed = filled(case, 2)
    before = reference_packed.dense(packed, pool.kv, pool.table, pool.lengths)[0]
    huge = pool.kv.clone()
    huge[:, :, 0, :, 5] *= 1000
    token = 40  # of the last row
    page = pool.table[-1, token // 16]
    huge[page, :, 1, token % 16] *= 1000
    ops.pack(packed, huge, pool.table, *nothing(packed))
    after = reference_packed.dense(packed, huge, pool.table, pool.lengths)[0]
    changed = (before != after) & ~(before.isnan() & after.isnan())
    assert bool(changed[:, :, 0, :, 5].any())
    keys = changed[:, :, 0].clone()
    keys[..., 5] = False
    assert not bool(keys.any())
    values = changed[:, :, 1].nonzero()
    assert {tuple(one) for one in values[:, [0, 2]].tolist()} == {
        ((len(case.lengths) - 1) * pool.table.shape[1] + token // 16, token % 16)
    }


def test_a_group_that_begins_with_nan_is_nan(isa: str) -> None:
    case = case_of(torch.float32)
    pool, _, packed = filled(case, 4)
    broken, page = pool.kv.clone(), pool.table[-1, 0]  # 32 tokens of a block are two pages
    broken[page, :, 0, 0, 5] = broken[page, :, 1, 3, 0] = torch.nan
    ops.pack(packed, broken, pool.table, *nothing(packed))
    block = packed.blocks[packed.table[-1, 0]]
    for head in range(case.kv_heads):
        keys, values = reference_packed.unpacked(block[head], Layout(4, 32, 64), packed.levels)
        assert bool(keys[:, 5].isnan().all())
        assert bool(values[3, :32].isnan().all())
        assert int(keys.isnan().sum()) == int(values.isnan().sum()) == 32


CASES = [
    *(case_of(dtype, group) for dtype in (torch.float32, torch.bfloat16) for group in (1, 3, 4, 8)),
    *(case_of(torch.bfloat16, 4, dim) for dim in (8, 16, 96, 128)),
    *(case_of(torch.bfloat16, 2, 64, size) for size in (1, 8, 32)),
]


def case_name(case: Case) -> str:
    return f"{str(case.dtype)[6:]}-g{case.group}-S{case.page_size}-D{case.head_dim}"


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_attention_is_that_over_what_the_codes_stand_for(isa: str, case: Case, bits: int) -> None:
    pool, q, packed = filled(case, bits)
    kv = pool.kv.double()
    for lists, unit in (
        (0, "pages"),
        (1, "pages"),
        (case.kv_heads, "pages"),
        (case.heads, "tokens"),
    ):
        index, count = random_lists(case, lists, unit) if lists else (None, None)
        place = (packed, pool.table, pool.lengths, index, count, unit)
        got = ops.attend_packed(q, pool.kv, *place)
        want = reference_packed.attend(q.double(), kv, *place)
        assert torch.equal(got.attended, want.attended)
        assert torch.equal(got.read, want.read)
        folded = case.dtype == torch.bfloat16
        assert close(got.lse, want.lse, "packed bf16" if folded else "sum")
        assert close(got.out, want.out, case.dtype)


@pytest.mark.parametrize("group", [16, 32, 64])
def test_groups_of_other_sizes(isa: str, group: int) -> None:
    case = case_of(torch.bfloat16, 4, 128)
    pool, q, packed = filled(case, 4, group)
    place = (packed, pool.table, pool.lengths)
    want = reference_packed.attend(q.double(), pool.kv.double(), *place)
    assert close(ops.attend_packed(q, pool.kv, *place).out, want.out, torch.bfloat16)


def same_alone(pool: Any, q: Tensor, packed: Packed, place: tuple[Any, ...]) -> bool:
    """Whether three threads give all rows what each of them gets alone, bit for bit."""
    try:
        ops.set_threads(3)
        together = ops.attend_packed(q, pool.kv, packed, *place)
    finally:
        ops.set_threads(None)
    agree = True
    for row in range(len(pool.lengths)):
        one = slice(row, row + 1)
        few = [None if x is None else x[one].contiguous() for x in place]
        parts = (packed.table[one].contiguous(), packed.keys[one], packed.values[one])
        held = packed._replace(table=parts[0], keys=parts[1], values=parts[2])
        alone = ops.attend_packed(q[one], pool.kv, held, *few)
        for got, want in zip(alone, together, strict=True):
            agree = agree and (got is None or torch.equal(got[0], want[row]))
    return agree


@pytest.mark.parametrize("lists", [0, 1, 2])
def test_bits_depend_on_neither_threads_nor_neighbours_nor_spelling(isa: str, lists: int) -> None:
    case = case_of(torch.bfloat16, 4, 128)
    pool, q, packed = filled(case, 4)
    index, count = random_lists(case, lists, "pages") if lists else (None, None)
    assert same_alone(pool, q, packed, (pool.table, pool.lengths, index, count))


def test_listing_every_page_gives_the_bits_of_listing_none(isa: str) -> None:
    case = case_of(torch.bfloat16, 4, 128, page_size=8)
    pool, q, packed = filled(case, 2)
    pages = (pool.lengths - 1) // 8 + 1
    index = torch.arange(int(pages.max()), dtype=torch.int32).expand(len(pages), 1, -1)
    listed = ops.attend_packed(
        q, pool.kv, packed, pool.table, pool.lengths, index.contiguous(), pages[:, None]
    )
    plain = ops.attend_packed(q, pool.kv, packed, pool.table, pool.lengths)
    assert torch.equal(listed.out, plain.out)
    assert torch.equal(listed.lse, plain.lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_which_nothing_is_packed_get_the_bits_of_attend(
    isa: str, dtype: torch.dtype
) -> None:
    case = case_of(dtype)
    pool, q, packed = filled(case, 4)
    got = ops.attend_packed(q, pool.kv, packed, pool.table, pool.lengths)
    want = ops.attend(q, pool.kv, pool.table, pool.lengths)
    whole = [row for row, end in enumerate(packed.values.tolist()) if not end]
    assert whole
    assert len(whole) < len(case.lengths)
    for row in range(len(case.lengths)):
        assert torch.equal(got.out[row], want.out[row]) == (row in whole)


def test_levels_that_are_not_uniform_are_looked_up(isa: str) -> None:
    case = case_of(torch.bfloat16, 4, 64)
    pool, q, packed = filled(case, 4)
    levels = torch.stack([torch.linspace(-1, 1, 16) ** 3 * 8, torch.linspace(-2, 2, 16).exp()])
    place = (packed._replace(levels=levels.bfloat16().float()), pool.table, pool.lengths)
    want = reference_packed.attend(q.double(), pool.kv.double(), *place)
    got = ops.attend_packed(q, pool.kv, *place)
    assert close(got.out, want.out, torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"group": 24}, "packed is group=24: choose a multiple of 16 tokens; expected a layout"),
        ({"levels": torch.zeros(2, 12)}, "packed.levels is of 12 levels; expected 2 to the bits"),
        ({"levels": torch.zeros(2, 32)}, "packed is bits=5: choose one of 2, 3, 4, 8; expected"),
        ({"levels": uniform(2)}, "packed.blocks is of 2560 bytes a block; expected 1536"),
        ({"keys": torch.zeros(1, dtype=torch.int32)}, r"packed.keys is of shape \[1\]; expected"),
        ({"table": -1}, r"packed.table\[\d, 0\] is -1, but the blocks are 0..\d+"),
        ({"keys": 1}, r"packed.keys\[0\] is 1; expected a multiple of 32 in 0..1"),
        ({"values": 300}, r"packed.values\[0\] is 300; expected a multiple of 1 in 0..1"),
    ],
)
def test_wrong_blocks_are_named(change: dict[str, Any], said: str) -> None:
    pool, q, packed = filled(case_of(torch.float32), 4)
    (name, value), *_ = change.items()
    if isinstance(value, int) and name != "group":
        value = torch.full_like(getattr(packed, name), value)
    wrong = packed._replace(**{name: value})
    with pytest.raises(ValueError, match=f"attend_packed: {said}"):
        ops.attend_packed(q, pool.kv, wrong, pool.table, pool.lengths)


def test_a_start_within_a_group_of_keys_is_refused() -> None:
    pool, _, packed = filled(case_of(torch.float32), 4)
    start = torch.full_like(packed.keys, 16)
    with pytest.raises(ValueError, match="pack: keys and values of row 0 begin at 16 and 0; exp"):
        ops.pack(packed, pool.kv, pool.table, start, torch.zeros_like(start))
