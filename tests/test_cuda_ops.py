"""What only a GPU's kernels can get wrong: many parts of a list, fp16, wrong values, graphs."""

from __future__ import annotations

from typing import Any

import gpu
import pytest
import torch
from pools import Case, close, empty_pool, filled_pool, name, queries, random_lists, shared

from quest_dist import faults, ops, reference

pytestmark = gpu.needs_gpu
needs_torch_with_cuda = pytest.mark.skipif(torch.version.cuda is None, reason="needs torch + CUDA")

HALF = [Case(torch.float16, g, s, d) for g, s, d in ((1, 16, 64), (4, 16, 128), (5, 32, 72))]
WIDE = [Case(d, g, 16, 256) for d, g in ((torch.float32, 2), (torch.bfloat16, 9))]


@pytest.fixture(autouse=True)
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ops run there."""
    gpu.move_ops(monkeypatch)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("case", HALF + WIDE, ids=name)
def test_every_op_on_types_and_widths_that_the_cpu_does_not_have(case: Case) -> None:
    pool, q = shared(case)
    place = (pool.table, pool.lengths)
    kv, meta, table = empty_pool(case, *pool.table.shape)
    for r, length in enumerate(case.lengths):
        one = slice(r, r + 1)
        ops.append(kv, meta, table[one], pool.k[one, :, :length], pool.v[one, :, :length], ints(0))
    assert torch.equal(kv.nan_to_num(9.0), pool.kv.nan_to_num(9.0))
    assert torch.equal(meta.nan_to_num(9.0), pool.meta.nan_to_num(9.0))
    exact, bounds = pool.as_float64()
    for reduce in ops.REDUCTIONS:
        got = ops.page_scores(q, pool.kv, pool.meta, *place, 0.7, reduce, True)
        want = reference.page_scores(q.double(), exact, bounds, *place, 0.7, reduce, True)
        assert close(got, want)
    assert close(
        ops.token_scores(q, pool.kv, *place), reference.token_scores(q.double(), exact, *place)
    )
    for lists, unit in ((1, "pages"), (case.heads, "tokens")):
        index, count = random_lists(case, lists, unit)
        options: dict[str, Any] = {"unit": unit, "probabilities": True}
        got = ops.attend(q, pool.kv, *place, index, count, **options)
        want = reference.attend(q.double(), exact, *place, index, count, **options)
        assert close(got.out, want.out, case.dtype)
        assert close(got.lse, want.lse)
        assert close(got.probabilities, want.probabilities)
        assert torch.equal(got.read, want.read)


LONG = (2047, 2049, 8193, 10000)


def long_pool(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Rows of LONG tokens, of two kv heads and six query heads of 64 channels."""
    generator = torch.Generator().manual_seed(5)
    pages = -(-max(LONG) // 16)
    shape = (len(LONG), 2, pages * 16, 64)
    k, v = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    kv, meta = ops.allocate_pages(1, len(LONG) * pages, 2, 16, 64, dtype)
    table = torch.randperm(len(LONG) * pages, generator=generator).view(len(LONG), -1).int()
    ops.append(kv[0], meta[0], table, k, v, ints(*[0] * len(LONG)))
    q = torch.randn(len(LONG), 6, 64, generator=generator).to(dtype)
    return q, kv[0], meta[0], table, ints(*LONG)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_rows_have_many_parts_and_windows(dtype: torch.dtype) -> None:
    q, kv, _, table, lengths = long_pool(dtype)
    got = ops.attend(q, kv, table, lengths, probabilities=True)
    want = reference.attend(q.double(), kv.double(), table, lengths, probabilities=True)
    assert close(got.out, want.out, dtype)
    assert close(got.lse, want.lse)
    assert close(got.probabilities, want.probabilities)
    again = ops.attend(q, kv, table, lengths)
    assert torch.equal(got.out, again.out)


@pytest.mark.parametrize("lists", [1, 2, 6])
def test_the_open_page_may_stand_anywhere_in_a_long_list(lists: int) -> None:
    q, kv, _, table, lengths = long_pool(torch.float32)
    rows, width = len(LONG), 120
    generator = torch.Generator().manual_seed(6)
    index = torch.full((rows, lists, width), -1, dtype=torch.int32)
    for r, length in enumerate(LONG):
        last = (length - 1) // 16
        for i in range(lists):
            chosen = torch.randperm(last, generator=generator)[:width]
            chosen[(37 * i + 11 * r) % width] = last
            index[r, i] = chosen
    count = torch.full((rows, lists), width, dtype=torch.int32)
    got = ops.attend(q, kv, table, lengths, index, count, probabilities=True)
    want = reference.attend(
        q.double(), kv.double(), table, lengths, index, count, probabilities=True
    )
    assert close(got.out, want.out, torch.float32)
    assert close(got.probabilities, want.probabilities)
    assert torch.equal(got.attended, want.attended)
    assert torch.equal(got.read, want.read)


def test_rolled_tokens_end_inside_a_part() -> None:
    q, kv, _, table, lengths = long_pool(torch.float32)
    index = torch.arange(max(LONG), dtype=torch.int32).repeat(len(LONG), 1, 1)
    count = lengths[:, None].clone()
    options: dict[str, Any] = {"unit": "tokens", "rolled_query": q.flip(0), "rolled": 1003}
    got = ops.attend(q, kv, table, lengths, index, count, **options)
    want = reference.attend(q, kv, table, lengths, index, count, **options)
    assert close(got.out, want.out.double(), torch.float32)


@pytest.mark.parametrize("items", [511, 512, 513, 9000, 40000])
def test_select_top_of_long_lists_with_many_ties(items: int) -> None:
    generator = torch.Generator().manual_seed(items)
    scores = torch.randint(-40, 40, (2, 2, items), generator=generator).float()
    for keep in (1, 2, items // 3, items - 1):
        for force_last in (False, True):
            sizes, most = ints(items, items - 7), ints(keep, keep)
            got = ops.select_top(scores, sizes, most, force_last)
            want = reference.select_top(scores, sizes, most, force_last)
            assert torch.equal(got[0], want[0])
            assert torch.equal(got[1], want[1])


def test_wrong_values_are_never_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "debug", False)
    case = Case(torch.float32, 3, 16)
    pool, q = filled_pool(case), queries(case)
    right = ops.attend(q, pool.kv, pool.table, pool.lengths)
    table, lengths = pool.table.clone(), pool.lengths.clone()
    table[0, 0], lengths[1], lengths[2] = 10**6, -5, 10**9
    got = ops.attend(q, pool.kv, table, lengths)
    assert (got.out[:3] == 0).all()
    assert (got.lse[:3] == -torch.inf).all()
    assert torch.equal(got.out[3:], right.out[3:])
    assert (ops.page_scores(q, pool.kv, pool.meta, table, lengths)[:3] == -torch.inf).all()
    before = pool.kv.clone()
    ops.append(pool.kv, pool.meta, table * 0 - 1, pool.k, pool.v, lengths * 0)
    assert torch.equal(before.nan_to_num(9.0), pool.kv.nan_to_num(9.0))
    with pytest.raises(ValueError, match="met a wrong value of lengths"):
        faults.check_faults(torch.device(gpu.there(q).device))
    faults.check_faults(torch.device(gpu.there(q).device))


@needs_torch_with_cuda
def test_a_pool_that_does_not_start_at_a_word_is_refused_and_a_query_copied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    case = Case(torch.bfloat16, 2, 16)
    pool, q = shared(case)
    kv, table, lengths = (gpu.there(x) for x in (pool.kv, pool.table, pool.lengths))
    want = ops.attend(gpu.there(q), kv, table, lengths)

    def shifted(x: torch.Tensor) -> torch.Tensor:
        memory = torch.empty(x.numel() + 1, dtype=x.dtype, device="cuda")
        return memory[1:].view(x.shape).copy_(x)

    assert torch.equal(ops.attend(shifted(q), kv, table, lengths).out, want.out)
    with pytest.raises(ValueError, match="attend: kv is 2 bytes off; expected memory aligned to"):
        ops.attend(gpu.there(q), shifted(kv), table, lengths)
    with pytest.raises(ValueError, match="attend: lengths is on cpu; expected cuda:0, as kv"):
        ops.attend(gpu.there(q), kv, table, pool.lengths)


@needs_torch_with_cuda
def test_a_graph_replays_while_rows_grow_across_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    generator = torch.Generator().manual_seed(8)
    steps, start = 40, 250
    kv, meta = ops.allocate_pages(1, 40, 2, 16, 64, torch.bfloat16, "cuda")
    table = torch.arange(40, dtype=torch.int32, device="cuda").view(2, 20)
    k, v = (torch.randn(2, 2, start + steps, 64, generator=generator).bfloat16() for _ in range(2))
    q = torch.randn(steps, 2, 8, 64, generator=generator).bfloat16().cuda()
    k, v = k.cuda(), v.cuda()
    lengths = torch.full((2,), start, dtype=torch.int32, device="cuda")
    keep = torch.full((2,), 6, dtype=torch.int32, device="cuda")
    now = [x[:, :, :1].clone() for x in (k, v)]
    query = q[0].clone()

    def step() -> torch.Tensor:
        ops.append(kv[0], meta[0], table, *now, lengths - 1)
        scores = ops.page_scores(query, kv[0], meta[0], table, lengths)
        index, count = ops.select_top(scores, (lengths - 1) // 16 + 1, keep, True)
        return ops.attend(query, kv[0], table, lengths, index, count).out

    def run(call: Any) -> list[torch.Tensor]:
        kv.zero_()
        ops.append(kv[0], meta[0], table, k[:, :, :start], v[:, :, :start], lengths * 0)
        lengths.fill_(start)
        outs = []
        for i in range(steps):
            lengths.add_(1)
            query.copy_(q[i])
            for to, x in zip(now, (k, v), strict=True):
                to.copy_(x[:, :, start + i : start + i + 1])
            outs.append(call().clone())
        return outs

    eager = run(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()

    def replay() -> torch.Tensor:
        graph.replay()
        return out

    assert all(torch.equal(a, b) for a, b in zip(eager, run(replay), strict=True))
