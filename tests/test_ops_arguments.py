"""Wrong arguments are refused in one line that names the op, the argument and what was expected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pools import Case, shared

from quest_dist import ops

CASE = Case(torch.float32, 2, 16)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def attend(**changes: Any) -> None:
    pool, q = shared(CASE)
    arguments = {"q": q, "kv": pool.kv, "page_table": pool.table, "lengths": pool.lengths}
    ops.attend(**{**arguments, **changes})


def lists(items: list[int], count: int | None = None) -> dict[str, torch.Tensor]:
    rows = len(CASE.lengths)
    index = ints(*items).repeat(rows, 1, 1)
    return {"index": index, "count": torch.full((rows, 1), count or len(items), dtype=torch.int32)}


POOL, Q = shared(CASE)
ROWS = len(CASE.lengths)
SCORES = torch.zeros(1, 1, 4)
BAD: list[tuple[str, Callable[[], Any]]] = [
    (r"attend: q is of shape \[.*\]; expected shape \[R, H, D\]", lambda: attend(q=Q[0])),
    (r"attend: q is of shape .* with R=7, .*D=64", lambda: attend(q=Q[..., :32])),
    ("attend: q is torch.bfloat16; expected torch.float32, as kv", lambda: attend(q=Q.bfloat16())),
    ("attend: q is list; expected a tensor", lambda: attend(q=Q.tolist())),
    (
        "attend: kv is torch.float64; expected torch.float32 or torch.bfloat16",
        lambda: attend(q=Q.double(), kv=POOL.kv.double()),
    ),
    (
        "attend: kv is strided .* contiguous tensor",
        lambda: attend(kv=POOL.kv.flip(0)[:, :, :, ::2]),
    ),
    (
        "attend: lengths is torch.int64; expected torch.int32",
        lambda: attend(lengths=POOL.lengths.long()),
    ),
    ("attend: H=3 is not a multiple of G=2", lambda: attend(q=Q[:, :3])),
    ("attend: unit is 'rows'; expected one of pages, tokens", lambda: attend(unit="rows")),
    ("attend: count is missing", lambda: attend(index=ints(0).repeat(ROWS, 1, 1))),
    (
        "attend: index is of 3 lists a row; expected 1, G=2 or H=4",
        lambda: attend(index=ints(0).repeat(ROWS, 3, 1), count=ints(1).repeat(ROWS, 3)),
    ),
    (r"attend: lengths\[0\] is 0", lambda: attend(lengths=POOL.lengths * 0)),
    (
        r"attend: lengths\[6\] is 9999",
        lambda: attend(lengths=POOL.lengths.clone().index_fill_(0, torch.tensor(6), 9999)),
    ),
    (
        r"attend: page_table\[0, 0\] is -1, but the pool's pages are 0\.\.",
        lambda: attend(page_table=torch.full_like(POOL.table, -1)),
    ),
    (r"attend: index: page 1 of row 0 is out of range 0\.\.0", lambda: attend(**lists([0, 1]))),
    (
        "attend: index: token -3 of row 0 is out of range",
        lambda: attend(**lists([-3]), unit="tokens"),
    ),
    (
        "attend: index: token 0 of row 0 is listed twice",
        lambda: attend(**lists([0, 0]), unit="tokens"),
    ),
    (r"attend: count\[0, 0\] is 5; expected 1\.\.2", lambda: attend(**lists([0, 0], count=5))),
    ("attend: rolled is 2; expected", lambda: attend(rolled=2)),
    (
        "attend: unit is 'pages'; expected 'tokens'",
        lambda: attend(**lists([0]), rolled_query=Q, rolled=1),
    ),
    (
        "append: k is of shape",
        lambda: ops.append(
            POOL.kv, POOL.meta, POOL.table, Q[:, :, None], Q[:, :, None], POOL.lengths
        ),
    ),
    (
        r"append: starts\[0\] is -1",
        lambda: ops.append(
            POOL.kv, POOL.meta, POOL.table, Q[:, :2, None], Q[:, :2, None], POOL.lengths * 0 - 1
        ),
    ),
    (
        r"append: starts\[0\] is 400: 1 tokens",
        lambda: ops.append(
            POOL.kv, POOL.meta, POOL.table, Q[:, :2, None], Q[:, :2, None], POOL.lengths * 0 + 400
        ),
    ),
    (
        "append: meta is of shape",
        lambda: ops.append(
            POOL.kv, POOL.kv, POOL.table, Q[:, :2, None], Q[:, :2, None], POOL.lengths
        ),
    ),
    (
        "page_scores: reduce is 'sum'; expected one of per_query, max, mean",
        lambda: ops.page_scores(Q, POOL.kv, POOL.meta, POOL.table, POOL.lengths, reduce="sum"),
    ),  # type: ignore[arg-type]
    (
        r"select_top: items\[0\] is 5, but scores has 4",
        lambda: ops.select_top(SCORES, ints(5), ints(1), False),
    ),
    (
        r"select_top: keep\[0\] is 0, but force_last",
        lambda: ops.select_top(SCORES, ints(4), ints(0), True),
    ),
    (
        "select_top: scores is torch.float64; expected torch.float32",
        lambda: ops.select_top(SCORES.double(), ints(4), ints(1), True),
    ),
    ("gather: length is 9999", lambda: ops.gather(POOL.kv, POOL.table, 9999)),
    (
        "prefill_attend: q is of 257 queries; expected at most L=100",
        lambda: ops.prefill_attend(POOL.k, POOL.k[:, :, :100], POOL.v[:, :, :100]),
    ),
    ("allocate_pages: page_size is 0", lambda: ops.allocate_pages(1, 1, 1, 0, 64, torch.float32)),
    ("set_threads: count is 0", lambda: ops.set_threads(0)),
    ("instruction set 'sse9' .* is unknown or not supported", lambda: ops.set_isa("sse9")),
    (
        "backend: 'cuda' is unknown; choose one of compiled, reference",
        lambda: ops.backend("cuda").__enter__(),
    ),
]


@pytest.mark.parametrize(("message", "call"), BAD, ids=[message for message, _ in BAD])
@pytest.mark.usefixtures("device")
def test_refused(message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_one_device_that_has_kernels() -> None:
    with pytest.raises(ValueError, match="attend: lengths is on meta; expected cpu, as kv"):
        attend(lengths=POOL.lengths.to("meta"))
    away = {"kv": POOL.kv, "page_table": POOL.table, "lengths": POOL.lengths, "q": Q}
    with pytest.raises(ValueError, match="kv is on meta; expected a tensor on the cpu or a CUDA"):
        attend(**{name: x.to("meta") for name, x in away.items()})
    with pytest.raises(ValueError, match=r"kv is torch\.float16; expected torch\.float32 or"):
        attend(kv=POOL.kv.half())


def test_a_refused_append_writes_nothing() -> None:
    pool, _ = shared(CASE)
    before = pool.kv.clone()
    table = pool.table.clone()
    table[-1] = -1
    with pytest.raises(ValueError, match=r"append: page_table\[6, 0\] is -1"):
        ops.append(pool.kv, pool.meta, table, pool.v, pool.v, torch.zeros(ROWS, dtype=torch.int32))
    assert torch.equal(before.nan_to_num(9.0), pool.kv.nan_to_num(9.0))


@pytest.mark.parametrize("backend", ["compiled", "reference"])
def test_both_backends_refuse_lists_alike(backend: str) -> None:
    with ops.backend(backend), pytest.raises(ValueError, match="page 1 of row 0 is out of range"):
        attend(**lists([0, 1]))


@pytest.mark.parametrize("order", ["ascending", "descending"])
@pytest.mark.parametrize("wrong", [-1, 5, 2**30, -(2**31)])
@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("op", ["page_scores", "token_scores", "attend", "gather", "decode"])
def test_no_page_outside_the_pool_is_looked_at(op: str, place: int, wrong: int, order: str) -> None:
    pages, heads = 5, 2
    kv, meta = (x[0] for x in ops.allocate_pages(1, pages, heads, 16, 64, torch.float32))
    table = torch.arange(4, dtype=torch.int32)[None]
    if order == "descending":
        table = table.flip(1).contiguous()
    table[0, place] = wrong
    q, lengths, one = torch.ones(1, 4, 64), ints(64), torch.ones(1, heads, 64)
    calls: dict[str, Callable[[], Any]] = {
        "page_scores": lambda: ops.page_scores(q, kv, meta, table, lengths, score_open=True),
        "token_scores": lambda: ops.token_scores(q, kv, table, lengths),
        "attend": lambda: ops.attend(q, kv, table, lengths),
        "gather": lambda: ops.gather(kv, table, 64),
        "decode": lambda: ops.decode(q, kv, meta, table, lengths, ints(2), k=one, v=one),
    }
    with pytest.raises(ValueError, match=rf"page_table\[0, {place}\] is {wrong}, but the pool's"):
        calls[op]()
