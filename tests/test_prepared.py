"""A prepared decode gives the bits of ops.decode, and checks what changes."""

from __future__ import annotations

import pytest
import torch
from new_tokens import KEEPS, Token, assert_same, new_token, pages, same
from pools import Case, name

from quest_dist import ops, reference
from quest_dist.backend import BACKENDS
from quest_dist.prepared import PreparedDecode

CASES = [
    Case(dtype, group, 16, 64) for dtype in (torch.float32, torch.bfloat16) for group in (1, 4)
]


def whole(case: Case) -> Token:
    """Rows that hold their newest token."""
    token = new_token(case).copy()
    new = (token.k[:, :, None], token.v[:, :, None])
    reference.append(token.kv, token.meta, token.table, *new, token.lengths - 1)
    return token


def place(token: Token) -> tuple[torch.Tensor, ...]:
    return token.kv, token.meta, token.table, token.lengths


@pytest.mark.parametrize("case", CASES, ids=name)
@pytest.mark.parametrize("kind", KEEPS)
@pytest.mark.parametrize("appends", [False, True])
def test_the_bits_of_decode_call_after_call(isa: str, case: Case, kind: str, appends: bool) -> None:
    ours, theirs = whole(case), whole(case)
    rule = {"radius_scale": 0.7, "reduce": "mean", "scale": 0.2}
    keep = pages(case, kind)
    step = PreparedDecode(*place(ours), keep, **rule)
    for turn in range(3):
        q = ours.q.roll(turn, dims=-1)
        new = (ours.k + turn, ours.v - turn) if appends else (None, None)
        got = step(q, *new)
        want = ops.decode(q, *place(theirs), keep, **rule, k=new[0], v=new[1])
        assert_same(got, want)
        assert same(ours.kv, theirs.kv)
        assert same(ours.meta, theirs.meta)


def test_values_of_lengths_and_keep_may_change(isa: str) -> None:
    token = whole(CASES[1])
    token.lengths = token.lengths.clone()
    keep = torch.full_like(token.lengths, -1)
    step = PreparedDecode(*place(token), keep)
    step(token.q)
    token.lengths -= token.lengths // 3
    keep.fill_(2)
    assert_same(step(token.q), ops.decode(token.q, *place(token), keep))


def test_results_have_one_place(isa: str) -> None:
    token = new_token(CASES[0])
    step = PreparedDecode(*place(token))
    first, second = step(token.q), step(token.q)
    assert first.out.data_ptr() == second.out.data_ptr() or token.kv.is_cuda


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda t: (t.q[:, :-1],), "decode: H=7 is not a multiple of G=2"),
        (lambda t: (t.q[..., :8],), r"decode: q is of shape .*D=64"),
        (lambda t: (t.q.double(),), "decode: q is torch.float64; expected torch.float32, as kv"),
        (lambda t: (t.q.transpose(1, 2),), "decode: q is of shape"),
        (
            lambda t: (t.q.mT.contiguous().mT,),
            "decode: q is strided .* a contiguous last dimension",
        ),
        (lambda t: (t.q, t.k), "decode: v is missing; expected k and v together"),
        (lambda t: (t.q, t.k, t.v[:, :1]), "decode: v is of shape"),
        (lambda t: (None,), "decode: q is NoneType; expected a tensor"),
    ],
)
def test_what_changes_is_checked(backend: str, change: object, error: str) -> None:
    token = new_token(Case(torch.float32, 4, 16, 64)).copy()
    with ops.backend(backend):
        step = PreparedDecode(*place(token))
        step(token.q, token.k, token.v)
        with pytest.raises(ValueError, match=error):
            step(*change(token))  # type: ignore[operator]


def test_wrong_settings_are_refused_as_by_decode() -> None:
    token = new_token(CASES[0])
    with pytest.raises(ValueError, match="decode: reduce is 'sum'; expected one of"):
        PreparedDecode(*place(token), reduce="sum")(token.q)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"decode: lengths is torch\.int64; expected"):
        PreparedDecode(token.kv, token.meta, token.table, token.lengths.long())(token.q)
