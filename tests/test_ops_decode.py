"""decode is append, page_scores, select_top and attend in one call: bit for bit, and in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from new_tokens import KEEPS, assert_same, decoded, in_pieces, new_token, pages, same
from pools import Case, close, empty_pool, filled_pool, name, queries, shared

from quest_dist import ops, reference

FLOATS = (torch.float32, torch.bfloat16)
CASES = [
    Case(dtype, group, page_size, head_dim)
    for dtype in FLOATS
    for group, page_size, head_dim in (
        (1, 16, 64),
        (2, 16, 128),
        (4, 16, 128),
        (8, 16, 64),
        (5, 8, 72),
        (3, 1, 64),
    )
] + [Case(torch.bfloat16, 4, 32, 128), Case(torch.float32, 1, 32, 128)]
SOME = [Case(d, g, 16) for d in FLOATS for g in (1, 4)]
every_case = pytest.mark.parametrize("case", CASES, ids=name)
some_cases = pytest.mark.parametrize("case", SOME, ids=name)


@every_case
@pytest.mark.parametrize("parts", ["", "append", "rotate", "append rotate"])
def test_the_bits_of_the_pieces(isa: str, case: Case, parts: str) -> None:
    token = new_token(case)
    if "append" not in parts:
        token = token.copy()
        reference.append(
            token.kv,
            token.meta,
            token.table,
            token.k[:, :, None],
            token.v[:, :, None],
            token.lengths - 1,
        )
    for kind in KEEPS:
        keep = pages(case, kind)
        for reduce in ("max",) if keep is None else ops.REDUCTIONS:
            ours, theirs = token.copy(), token.copy()
            got = decoded(ours, parts, keep, reduce=reduce, radius_scale=0.7)
            want = in_pieces(theirs, parts, keep, reduce, 0.7)
            assert_same(got, want)
            assert same(ours.kv, theirs.kv)
            assert same(ours.meta, theirs.meta)


@every_case
def test_what_it_computes(isa: str, case: Case) -> None:
    token = new_token(case).copy()
    if case.dtype == torch.float32:
        exact = [x.double() for x in (token.q, token.k, token.v, token.cos, token.sin)]
        parts, (q, k, v) = "append rotate", exact[:3]
        cos, sin = exact[3:]
    else:  # a rotated query is rounded: only what follows can be held to float64
        parts, cos, sin = "append", None, None
        q, k, v = (x.double() for x in (token.q, token.k, token.v))
    kv, meta, keep = token.kv.double(), token.meta.double(), pages(case, "mixed")
    place = (kv, meta, token.table, token.lengths)
    want = reference.decode(q, *place, keep, 1.0, "mean", 0.2, k, v, cos, sin)
    got = decoded(token, parts, keep, reduce="mean", scale=0.2)
    assert close(got.out, want.out, case.dtype)
    assert close(got.lse, want.lse)
    assert torch.equal(got.attended, want.attended)
    assert torch.equal(got.read, want.read)
    assert close(token.kv.nan_to_num(9.0), kv.nan_to_num(9.0), case.dtype)


@some_cases
def test_a_rotation_turns_each_pair_of_channels_by_its_angle(isa: str, case: Case) -> None:
    token = new_token(case)
    half = case.head_dim // 2
    x = token.q.double()
    pair = torch.complex(x[..., :half], x[..., half:])
    turned = pair * torch.complex(token.cos.double(), token.sin.double())[:, None, :half]
    want = torch.cat((turned.real, turned.imag), dim=-1)
    assert close(reference.rotate(token.q, token.cos, token.sin), want, case.dtype)
    # One page of one key: a score shows what the kernels made of q, and the pool what of k.
    first = token.copy()
    first.lengths = torch.ones_like(first.lengths)
    got = decoded(first, "append rotate", None)
    keys = first.kv[first.table[:, 0].long(), :, 0, 0]
    assert torch.equal(keys, reference.rotate(token.k, token.cos, token.sin))
    scores = (want.unflatten(1, (case.kv_heads, -1)) * keys.double()[:, :, None]).sum(-1)
    room = 40 if case.dtype == torch.bfloat16 else 1  # of q rounded once, over D products
    error = (got.lse - scores.flatten(1) * case.head_dim**-0.5).abs().max()
    assert error <= room * (2**-9 if case.dtype == torch.bfloat16 else 2e-6)


@some_cases
def test_angles_in_the_dtype_of_the_query(isa: str, case: Case) -> None:
    ours, theirs = new_token(case).copy(), new_token(case).copy()
    ours.cos, ours.sin = ours.cos.to(case.dtype), ours.sin.to(case.dtype)
    theirs.cos, theirs.sin = ours.cos.float(), ours.sin.float()
    keep = pages(case, "some")
    assert_same(decoded(ours, "append rotate", keep), decoded(theirs, "append rotate", keep))
    assert same(ours.kv, theirs.kv)


@some_cases
def test_strided_as_the_slices_of_one_projection(isa: str, case: Case) -> None:
    ours, theirs = new_token(case).copy(), new_token(case).copy()
    rows, groups, heads = len(case.lengths), case.kv_heads, case.heads
    whole = torch.cat([x.reshape(rows, -1) for x in (ours.q, ours.k, ours.v)], dim=1)
    wide = whole.view(rows, heads + 2 * groups, case.head_dim)
    ours.q, ours.k, ours.v = wide.split((heads, groups, groups), dim=1)
    angles = torch.cat((ours.cos, ours.sin), dim=1)
    ours.cos, ours.sin = angles.chunk(2, dim=1)
    keep = pages(case, "mixed")
    assert_same(decoded(ours, "append rotate", keep), decoded(theirs, "append rotate", keep))
    assert same(ours.kv, theirs.kv)


@some_cases
def test_a_row_alone_equals_the_row_in_its_batch(isa: str, case: Case) -> None:
    token, keep = new_token(case), pages(case, "mixed")
    assert keep is not None
    batch = decoded(token.copy(), "append rotate", keep)
    for r in range(len(case.lengths)):
        one = slice(r, r + 1)
        alone = token.copy()
        for field in ("table", "lengths", "q", "k", "v", "cos", "sin"):
            setattr(alone, field, getattr(alone, field)[one])
        got = decoded(alone, "append rotate", keep[one])
        assert_same(got, ops.Attended(*(None if x is None else x[one] for x in batch)))


@some_cases
def test_a_row_decoded_token_by_token(isa: str, case: Case) -> None:
    pool, steps = filled_pool(case), 40
    kv, meta, table = empty_pool(case, *pool.table.shape)
    kinds: tuple[ops.Reduce, ...] = ("max", "per_query")
    for length in range(1, steps + 1):
        lengths = torch.full_like(pool.lengths, length)
        new = {"k": pool.k[:, :, length - 1], "v": pool.v[:, :, length - 1]}
        q = queries(case, seed=length)
        place, keep = (kv, meta, table, lengths), torch.full_like(lengths, 2)
        got = ops.decode(q, *place, keep, reduce=kinds[length % 2], **new)
        kept = min(length, length - (length - 1) // 16 * 16 + 16)
        assert (got.attended == kept).all()
    assert torch.equal(
        kv[table.long()][:, : steps // 16, :, 0],
        pool.k[:, :, : steps // 16 * 16].unflatten(2, (-1, 16)).transpose(1, 2),
    )
    closed = meta[table[:, : steps // 16].long()]
    assert torch.equal(closed[:, :, :, 0], kv[table[:, : steps // 16].long(), :, 0].amax(dim=3))


@pytest.mark.parametrize("dtype", FLOATS)
def test_long_rows_of_many_small_pages(device: str, dtype: torch.dtype) -> None:
    """Lists longer than what a GPU's block holds; so many scores that any other rounding shows."""
    generator = torch.Generator().manual_seed(9)
    lengths, shape = (20_000, 9000, 700), (3, 1, 20_000, 8)
    k, v = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    table = torch.randperm(60_000, generator=generator).view(3, -1).int()
    kv, meta = ops.allocate_pages(1, 60_000, 1, 1, 8, dtype)
    ops.append(kv[0], meta[0], table, k, v, torch.zeros(3, dtype=torch.int32))
    q = torch.randn(3, 2, 8, generator=generator).to(dtype)
    angle = torch.rand(3, 4, generator=generator).repeat(1, 2)
    turned = reference.rotate(q, angle.cos(), angle.sin())
    place = (kv[0], meta[0], table, torch.tensor(lengths, dtype=torch.int32))
    for keep in ((19_000, 8500, 699), (3, 4500, 350), (9001, 1, -1)):
        kept = torch.tensor(keep, dtype=torch.int32)
        for reduce in ("max", "per_query"):
            got = ops.decode(q, *place, kept, reduce=reduce, cos=angle.cos(), sin=angle.sin())
            scores = ops.page_scores(turned, *place, reduce=reduce)
            index, count = ops.select_top(scores, place[3], kept, True)
            assert_same(got, ops.attend(turned, kv[0], table, place[3], index, count))


@every_case
def test_memory_that_nothing_wrote_is_never_read(device: str, case: Case) -> None:
    wanted = decoded(new_token(case).copy(), "append rotate", pages(case, "mixed"))
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
    try:
        assert torch.empty(3).isnan().all()
        got = decoded(new_token(case).copy(), "append rotate", pages(case, "mixed"))
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(got, wanted)


@some_cases
def test_what_is_fp32_stays_so_whatever_torch_makes_by_default(device: str, case: Case) -> None:
    keep = pages(case, "mixed")
    wanted = decoded(new_token(case).copy(), "append rotate", keep)
    pool, q = shared(case)
    place = (pool.table, pool.lengths)

    def others() -> list[torch.Tensor]:
        weighed = ops.attend(q, pool.kv, *place, probabilities=True)
        assert weighed.probabilities is not None
        scores = ops.page_scores(q, pool.kv, pool.meta, *place)
        return [scores, ops.token_scores(q, pool.kv, *place), weighed.probabilities, weighed.lse]

    tensors = others()
    torch.set_default_dtype(torch.float64)
    try:
        got, again = decoded(new_token(case).copy(), "append rotate", keep), others()
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(got, wanted)
    for ours, theirs in zip((got.lse, *again), (wanted.lse, *tensors), strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)


BAD: list[tuple[str, dict[str, Any]]] = [
    (r"decode: lengths\[0\] is 0", {"lengths": torch.zeros(7, dtype=torch.int32)}),
    (r"decode: lengths\[6\] is 9999", {"lengths": torch.tensor([1] * 6 + [9999]).int()}),
    (r"decode: keep\[2\] is 0", {"keep": torch.tensor([-1, 1, 0, 1, 1, 1, 1]).int()}),
    (r"page_table\[0, 0\] is -1, but the pool's pages are 0\.\.", {"page_table": -1}),
    ("decode: keep is torch.int64; expected torch.int32", {"keep": torch.ones(7).long()}),
    (r"decode: keep is of shape \[6\]; expected shape \[R\] with R=7", {"keep": torch.ones(6)}),
    ("decode: reduce is 'sum'; expected one of per_query, max, mean", {"reduce": "sum"}),
    ("decode: v is missing; expected k and v together", {"v": None}),
    ("decode: k is missing; expected k and v together", {"k": None}),
    ("decode: sin is missing; expected cos and sin together", {"sin": None}),
    ("decode: v is torch.bfloat16; expected torch.float32", {"v": torch.ones(7, 2, 64).bfloat16()}),
    (r"decode: k is of shape \[7, 4, 64\]; expected", {"k": torch.ones(7, 4, 64)}),
    (r"decode: q is of shape .*; expected shape \[R, H, D\] with R=7", {"q": torch.ones(6, 4, 64)}),
    ("decode: H=3 is not a multiple of G=2", {"q": torch.ones(7, 3, 64)}),
    (r"decode: cos is of shape \[7, 32\]; expected", {"cos": torch.ones(7, 32)}),
    ("decode: cos is torch.int64; expected torch.float32", {"cos": torch.ones(7, 64).long()}),
    (
        "decode: sin is torch.bfloat16; expected torch.float32",
        {"sin": torch.ones(7, 64).bfloat16()},
    ),
    ("decode: meta is of shape", {"meta": torch.ones(3, 2, 2, 64)}),
]


@pytest.mark.parametrize(("message", "changes"), BAD, ids=[message for message, _ in BAD])
def test_refused(device: str, message: str, changes: dict[str, Any]) -> None:
    token = new_token(Case(torch.float32, 2, 16)).copy()
    before, keep = token.copy(), torch.full((7,), 2, dtype=torch.int32)
    if "page_table" in changes:
        changes = {"page_table": torch.full_like(token.table, -1)}
    arguments = {
        **{field: getattr(token, field) for field in ("q", "kv", "meta", "lengths")},
        **{field: getattr(token, field) for field in ("k", "v", "cos", "sin")},
        **{"page_table": token.table, "keep": keep, "reduce": "max"},
        **changes,
    }
    places = ("q", "kv", "meta", "page_table", "lengths", "keep")
    positional = [arguments.pop(place) for place in places]
    with pytest.raises(ValueError, match=message):
        ops.decode(*positional, **arguments)
    if device == "cpu":
        assert same(token.kv, before.kv)


def test_halves_need_an_even_head_dimension() -> None:
    token = new_token(Case(torch.float32, 1, 8, 5))
    with pytest.raises(ValueError, match="decode: cos is for head dimension 5; expected an even"):
        decoded(token.copy(), "rotate", None)


def test_the_reference_backend_runs_in_float64() -> None:
    case = SOME[0]
    token = new_token(case).copy()
    for field in ("kv", "meta", "q", "k", "v", "cos", "sin"):
        setattr(token, field, getattr(token, field).double())
    with ops.backend("reference"):
        got = decoded(token, "append rotate", pages(case, "some"))
    assert got.out.dtype == torch.float64
    assert math.isfinite(got.lse.sum())
    ours = decoded(new_token(case).copy(), "append rotate", pages(case, "some"))
    assert close(ours.out, got.out)
