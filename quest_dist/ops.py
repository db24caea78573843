"""Ops: the compiled kernels of one attention step; arguments checked here, dispatched by device.

Pages live in tensors that `allocate_pages` makes; their physical layout belongs to the backend, so
callers index kv[layer] and meta[layer] and never look inside. What each op computes, equation by
equation, stands in `reference.py`, which also runs here under `with backend('reference')`.

Invariants: a row's result is the same bits for any number of threads and whatever other rows are in
the call; selecting all tokens gives the bits of not selecting. Scores, softmax and sums are fp32 and
never rounded before they are used; `out` is rounded once to the dtype of q.

Shape letters: R rows, H query heads, G kv heads, N pages of the pool, P pages in a row's table, S
page size, D head dimension, L tokens, n new tokens, Hs lists of a selection (1, G or H).
Errors: ValueError naming the op, the argument and what was expected.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from quest_dist import reference
from quest_dist.arguments import Arguments
from quest_dist.reference import Attended

Unit = Literal["pages", "tokens"]
Reduce = Literal["per_query", "max", "mean"]
UNITS = ("pages", "tokens")
REDUCTIONS = ("per_query", "max", "mean")
BACKENDS = ("compiled", "reference")
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
LARGEST_HEAD = 1024

_backend: ContextVar[str] = ContextVar("quest_dist_backend", default="compiled")
_threads = 0


@cache
def _compiled() -> ModuleType:
    try:
        from quest_dist import _cpu
    except ImportError as error:
        if "_cpu" in str(error) and "instruction set" not in str(error):
            raise ImportError(
                f"quest_dist._cpu is not built for this Python ({error}): run "
                "`make setup`, or `python setup.py build_ext --inplace`"
            ) from error
        raise
    return _cpu


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the ops of this context 'compiled' (the default) or as the plain-torch 'reference'."""
    if name not in BACKENDS:
        raise ValueError(f"backend: {name!r} is unknown; choose one of {', '.join(BACKENDS)}")
    token = _backend.set(name)
    try:
        yield
    finally:
        _backend.reset(token)


def set_threads(count: int | None) -> None:
    """Use this many threads in the ops; None follows torch.get_num_threads(), as at the start."""
    global _threads
    if count is not None and count < 1:
        raise ValueError(f"set_threads: count is {count}; expected at least 1, or None")
    _threads = count or 0


def threads() -> int:
    """Threads that the ops use."""
    return _threads or torch.get_num_threads()


def isa() -> str:
    """The instruction set in use; the environment variable QUEST_ISA names another."""
    return str(_compiled().isa())


def isas() -> tuple[str, ...]:
    """Instruction sets that this machine supports, best first."""
    return tuple(_compiled().isas().split(", "))


def set_isa(name: str) -> None:
    """Use another instruction set from now on, in all threads."""
    _compiled().set_isa(name)


def allocate_pages(
    layers: int, pages: int, kv_heads: int, page_size: int, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """A pool of zeroed pages, kv and meta; kv[layer] and meta[layer] are what the ops take."""
    sizes = {"layers": layers, "pages": pages, "kv_heads": kv_heads, "page_size": page_size}
    for name, size in {**sizes, "head_dim": head_dim}.items():
        if size < 1:
            raise ValueError(f"allocate_pages: {name} is {size}; expected at least 1")
    kv = torch.zeros(layers, pages, kv_heads, 2, page_size, head_dim, dtype=dtype)
    return kv, torch.zeros(layers, pages, kv_heads, 2, head_dim, dtype=dtype)


def _by_reference() -> bool:
    return _backend.get() == "reference"


def _arguments(op: str) -> Arguments:
    return Arguments(op, None if _by_reference() else tuple(DTYPES))


def _take_pool(
    a: Arguments, kv: Tensor, page_table: Tensor, lengths: Tensor | None, name: str = "lengths"
) -> None:
    a.floats("kv", kv, "N G 2 S D")
    a.of_dtype("page_table", page_table, "R P")
    if lengths is not None:
        a.of_dtype(name, lengths, "R")
    if kv.device.type != "cpu":
        raise a.refuse("kv", f"on {kv.device}", "a tensor on the cpu; no other device is supported")
    if a["D"] > LARGEST_HEAD:
        raise a.refuse("kv", f"of head dimension {a['D']}", f"at most {LARGEST_HEAD}")


def _pages(a: Arguments, kv: Tensor, page_table: Tensor, meta: int = 0) -> object:
    sizes = [a[letter] for letter in "NGSDRP"]
    return _compiled().Pages(kv.data_ptr(), meta, page_table.data_ptr(), DTYPES[kv.dtype], *sizes)


def _strided(x: Tensor) -> object:
    return _compiled().Strided(x.data_ptr(), x.stride(0), x.stride(1), x.stride(2))


def append(
    kv: Tensor, meta: Tensor, page_table: Tensor, k: Tensor, v: Tensor, starts: Tensor
) -> None:
    """Write k, v [R, G, n, D] (rotated keys) at logical positions starts[r] + i of one layer.

    A page that fills gets its metadata, from all its keys, in `meta` [N, G, 2, D].
    """
    a = _arguments("append")
    _take_pool(a, kv, page_table, starts, "starts")
    a.floats("meta", meta, "N G 2 D")
    a.floats("k", k, "R G n D", contiguous=False)
    a.floats("v", v, "R G n D", contiguous=False)
    if _by_reference():
        return reference.append(kv, meta, page_table, k, v, starts)
    pages = _pages(a, kv, page_table, meta.data_ptr())
    _compiled().append(pages, _strided(k), _strided(v), starts.data_ptr(), a["n"], threads())
    return None


def page_scores(
    q: Tensor,
    kv: Tensor,
    meta: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    radius_scale: float = 1.0,
    reduce: Reduce = "per_query",
    score_open: bool = False,
) -> Tensor:
    """Quest's page scores, fp32 [R, Hs, P]: an upper bound of q.k in the page at radius_scale 1.

    The last page of a row (which holds position lengths - 1) and those beyond score -inf;
    `score_open` scores the last page too, by the keys it holds.
    """
    a = _arguments("page_scores")
    _take_pool(a, kv, page_table, lengths)
    a.floats("meta", meta, "N G 2 D")
    q = a.floats("q", q, "R H D", contiguous=False).contiguous()
    a.multiple("H", "G", "query heads share kv heads evenly")
    kind = a.choice("reduce", reduce, REDUCTIONS)
    if _by_reference():
        return reference.page_scores(
            q, kv, meta, page_table, lengths, radius_scale, reduce, score_open
        )
    scores = torch.empty(a["R"], a["G"] if kind else a["H"], a["P"])
    _compiled().page_scores(
        _pages(a, kv, page_table, meta.data_ptr()),
        q.data_ptr(),
        a["H"],
        lengths.data_ptr(),
        radius_scale,
        kind,
        score_open,
        scores.data_ptr(),
        threads(),
    )
    return scores


def select_top(
    scores: Tensor, items: Tensor, keep: Tensor, force_last: bool
) -> tuple[Tensor, Tensor]:
    """The keep[r] best of the first items[r] of scores fp32 [R, Hs, M].

    Gives index int32 [R, Hs, K], ascending, -1 where unused, and count int32 [R, Hs], -1 meaning
    everything (keep >= items or keep < 0). Ties go to the higher position; NaN counts as -inf.
    `force_last` keeps item items - 1 without competition, as one of the keep[r].
    """
    a = Arguments("select_top", None)
    a.of_dtype("items", items, "R")
    a.of_dtype("keep", keep, "R")
    if _by_reference():
        a.floats("scores", scores, "R Hs M")
        return reference.select_top(scores, items, keep, force_last)
    a.of_dtype("scores", scores, "R Hs M", torch.float32)
    width = max(0, int(keep.masked_fill(keep >= items, 0).max())) if a["R"] else 0
    index = torch.empty(a["R"], a["Hs"], width, dtype=torch.int32)
    count = torch.empty(a["R"], a["Hs"], dtype=torch.int32)
    _compiled().select_top(
        scores.data_ptr(),
        items.data_ptr(),
        keep.data_ptr(),
        a["R"],
        a["Hs"],
        a["M"],
        force_last,
        index.data_ptr(),
        width,
        count.data_ptr(),
        threads(),
    )
    return index, count


def attend(
    q: Tensor,
    kv: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    index: Tensor | None = None,
    count: Tensor | None = None,
    unit: Unit = "pages",
    scale: float | None = None,
    probabilities: bool = False,
    rolled_query: Tensor | None = None,
    rolled: int = 0,
) -> Attended:
    """Attention of one query a row, q [R, H, D], over the pages or tokens that its lists name.

    index int32 [R, Hs, K] and count int32 [R, Hs] as `select_top` gives them; Hs is 1, G or H; no
    index, or count -1, means every token. Lists may be in any order but must not name a thing twice
    or be empty. `scale` defaults to D ** -0.5. The first `rolled` tokens of each list of tokens are
    scored with `rolled_query` [R, H, D] in place of q.
    """
    a = _arguments("attend")
    _take_pool(a, kv, page_table, lengths)
    q = a.floats("q", q, "R H D", contiguous=False).contiguous()
    a.multiple("H", "G", "query heads share kv heads evenly")
    kind = a.choice("unit", unit, UNITS)
    if (index is None) != (count is None):
        raise a.refuse("count" if count is None else "index", "missing", "index and count together")
    if index is not None:
        a.of_dtype("index", index, "R Hs K")
        a.of_dtype("count", count, "R Hs")
        if a["Hs"] not in (1, a["G"], a["H"]):
            raise a.refuse("index", f"of {a['Hs']} lists a row", f"1, G={a['G']} or H={a['H']}")
    if (rolled_query is None) != (rolled == 0) or rolled < 0:
        raise a.refuse(
            "rolled", str(rolled), "a positive number exactly when rolled_query is given"
        )
    if rolled_query is not None:
        rolled_query = a.floats(
            "rolled_query", rolled_query, "R H D", contiguous=False
        ).contiguous()
        if index is not None and unit != "tokens":
            raise a.refuse("unit", repr(unit), "'tokens' when a rolled_query is given")
    scale = a["D"] ** -0.5 if scale is None else scale
    if _by_reference():
        return reference.attend(
            q,
            kv,
            page_table,
            lengths,
            index,
            count,
            unit,
            scale,
            probabilities,
            rolled_query,
            rolled,
        )
    compiled, rows, heads = _compiled(), a["R"], a["H"]
    pages = _pages(a, kv, page_table)
    if index is None or count is None:
        selection = compiled.Selection(0, 0, 1, 0, kind)
    else:
        selection = compiled.Selection(index.data_ptr(), count.data_ptr(), a["Hs"], a["K"], kind)
    width, weights = 0, None
    if probabilities:
        width = compiled.listed_tokens(pages, lengths.data_ptr(), selection)
        weights = torch.empty(rows, heads, width)
    result = Attended(
        out=torch.empty_like(q),
        attended=torch.empty(rows, heads, dtype=torch.int32),
        read=torch.empty(rows, a["G"], dtype=torch.int32),
        probabilities=weights,
        lse=torch.empty(rows, heads),
    )
    compiled.attend(
        pages,
        q.data_ptr(),
        0 if rolled_query is None else rolled_query.data_ptr(),
        rolled,
        heads,
        lengths.data_ptr(),
        selection,
        scale,
        result.out.data_ptr(),
        result.attended.data_ptr(),
        result.read.data_ptr(),
        result.lse.data_ptr(),
        0 if weights is None else weights.data_ptr(),
        width,
        threads(),
    )
    return result


def token_scores(
    q: Tensor, kv: Tensor, page_table: Tensor, lengths: Tensor, scale: float | None = None
) -> Tensor:
    """scale q.k of every token: fp32 [R, H, longest length], -inf beyond a row's length."""
    a = _arguments("token_scores")
    _take_pool(a, kv, page_table, lengths)
    q = a.floats("q", q, "R H D", contiguous=False).contiguous()
    a.multiple("H", "G", "query heads share kv heads evenly")
    scale = a["D"] ** -0.5 if scale is None else scale
    if _by_reference():
        return reference.token_scores(q, kv, page_table, lengths, scale)
    width = max(0, int(lengths.max())) if a["R"] else 0
    scores = torch.empty(a["R"], a["H"], width)
    _compiled().token_scores(
        _pages(a, kv, page_table),
        q.data_ptr(),
        a["H"],
        lengths.data_ptr(),
        scale,
        scores.data_ptr(),
        width,
        threads(),
    )
    return scores


def gather(kv: Tensor, page_table: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The first `length` tokens of every row, dense: k, v [R, G, length, D]."""
    a = _arguments("gather")
    _take_pool(a, kv, page_table, None)
    if not 0 <= length <= a["P"] * a["S"]:
        raise a.refuse("length", str(length), f"0..{a['P'] * a['S']}, the slots of a row")
    if _by_reference():
        return reference.gather(kv, page_table, length)
    k = torch.empty(a["R"], a["G"], length, a["D"], dtype=kv.dtype)
    v = torch.empty_like(k)
    pages = _pages(a, kv, page_table)
    _compiled().gather(pages, length, k.data_ptr(), v.data_ptr(), threads())
    return k, v


def _take_prompt(a: Arguments, q: Tensor, k: Tensor) -> None:
    a.floats("q", q, "R H n D", contiguous=False)
    a.floats("k", k, "R G L D", contiguous=False)
    a.multiple("H", "G", "query heads share kv heads evenly")
    if a["n"] > a["L"]:
        raise a.refuse("q", f"of {a['n']} queries", f"at most L={a['L']}: they are the last of L")


def prefill_attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Dense causal attention of the last n of L positions: q [R, H, n, D], k, v [R, G, L, D] ->

    [R, n, H, D]. bf16 with D of 64 or 128 is compiled where the CPU multiplies bf16 (probabilities
    are then rounded to bf16 before they weigh values, as in flash attention); else torch's SDPA.
    """
    a = _arguments("prefill_attend")
    _take_prompt(a, q, k)
    a.floats("v", v, "R G L D", contiguous=False)
    scale = a["D"] ** -0.5 if scale is None else scale
    if _by_reference():
        return reference.prefill_attend(q, k, v, scale)
    rows, heads, queries, length, dim = (a[letter] for letter in "RHnLD")
    if q.dtype == torch.bfloat16 and dim in (64, 128) and _compiled().has_prefill():
        out = torch.empty(rows, queries, heads, dim, dtype=q.dtype)
        size = _compiled().prefill_workspace(rows, a["G"], length, dim)
        workspace = torch.empty(size, dtype=torch.uint8)
        _compiled().prefill_attend(
            _strided(q),
            _strided(k),
            _strided(v),
            rows,
            heads,
            a["G"],
            queries,
            length,
            dim,
            scale,
            out.data_ptr(),
            workspace.data_ptr(),
            threads(),
        )
        return out
    seen = None
    if 1 < queries < length:
        seen = torch.ones(queries, length, dtype=torch.bool).tril(length - queries)
    dense = torch.nn.functional.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=seen,
        is_causal=queries > 1 and queries == length,
        scale=scale,
        enable_gqa=heads != a["G"],
    )
    return dense.transpose(1, 2).contiguous()


def column_sums(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """Causal attention mass that each key gets from the last n queries: fp32 [R, H, L]."""
    a = _arguments("column_sums")
    _take_prompt(a, q, k)
    return reference.column_sums(q, k, a["D"] ** -0.5 if scale is None else scale)
