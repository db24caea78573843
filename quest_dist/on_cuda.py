"""The checked ops on a GPU: results are allocated here, and quest_dist._cuda fills them.

Called by `ops` alone, with the arguments it has checked; see there for what each op means.

Invariants: an op only launches, on torch's current stream of the tensors' device. It reads nothing
back, so that it can be captured in a CUDA graph (QUEST_DEBUG=1 reads faults back, outside of one);
hence what the CPU sizes by values is sized by shapes here: lists of `select_top` by the scores,
token scores and probabilities by the slots of a row. What is beyond the values is padding as there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quest_dist.arguments import DTYPES, WORD, Arguments, one_token, strided
from quest_dist.backend import compiled_cuda
from quest_dist.faults import check, fault_of
from quest_dist.metadata import Int8Metadata
from quest_dist.packing import Packed
from quest_dist.reference import Attended

if TYPE_CHECKING:
    from quest_dist.int4 import Int4

#: (device, stream, whether it is for a graph) -> the capture and its counters.
_counters: dict[tuple[torch.device, int, bool], tuple[int, Tensor]] = {}


def append(
    a: Arguments, kv: Tensor, meta: Tensor, page_table: Tensor, k: Tensor, v: Tensor, starts: Tensor
) -> None:
    """ops.append."""
    native = compiled_cuda()
    k, v = _in_words(k), _in_words(v)
    pages = a.pages(native, kv, page_table, meta)
    from_k, from_v = strided(native, k), strided(native, v)
    native.append(_launch(kv), pages, from_k, from_v, starts.data_ptr(), a["n"])
    check(a, page_table=page_table, starts=starts)


def linear4(native: Any, x: Tensor, outputs: int) -> Tensor:
    """int4.linear of few rows x [R, inputs]; `native` are the packed weights."""
    x = _in_words(x)
    out = torch.empty(x.shape[0], outputs, dtype=x.dtype, device=x.device)
    rows, kind = x.shape[0], DTYPES[x.dtype]
    compiled_cuda().linear4(_launch(x), native, x.data_ptr(), kind, rows, out.data_ptr())
    return out


def widen4(native: Any, weight: Int4, dtype: torch.dtype, first: int, count: int) -> Tensor:
    """int4.widened; `native` are the packed weights."""
    out = torch.empty(count, weight.inputs, dtype=dtype, device=weight.data.device)
    compiled_cuda().widen4(_launch(out), native, first, count, DTYPES[dtype], out.data_ptr())
    return out


def page_scores(
    a: Arguments,
    q: Tensor,
    kv: Tensor,
    meta: Tensor | Int8Metadata,
    page_table: Tensor,
    lengths: Tensor,
    radius_scale: float,
    kind: int,
    score_open: bool,
) -> Tensor:
    """ops.page_scores; `kind` counts in ops.REDUCTIONS."""
    if isinstance(meta, Int8Metadata):
        raise a.refuse("meta", "Int8Metadata", "a tensor: int8 is scored on a CPU only")
    native, q = compiled_cuda(), _in_words(q)
    scores = torch.empty(
        a["R"], a["G"] if kind else a["H"], a["P"], dtype=torch.float32, device=kv.device
    )
    native.page_scores(
        _launch(kv),
        a.pages(native, kv, page_table, meta),
        q.data_ptr(),
        a["H"],
        lengths.data_ptr(),
        radius_scale,
        kind,
        score_open,
        scores.data_ptr(),
    )
    check(a, page_table=page_table, lengths=lengths)
    return scores


def select_top(
    a: Arguments, scores: Tensor, items: Tensor, keep: Tensor, force_last: bool
) -> tuple[Tensor, Tensor]:
    """ops.select_top, as wide as the scores."""
    rows, lists, width = scores.shape
    index = torch.empty(rows, lists, width, dtype=torch.int32, device=scores.device)
    count = torch.empty(rows, lists, dtype=torch.int32, device=scores.device)
    compiled_cuda().select_top(
        _launch(scores),
        scores.data_ptr(),
        items.data_ptr(),
        keep.data_ptr(),
        rows,
        lists,
        width,
        force_last,
        index.data_ptr(),
        width,
        count.data_ptr(),
    )
    check(a, items=items, keep=keep)
    return index, count


def attend(
    a: Arguments,
    q: Tensor,
    kv: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    index: Tensor | None,
    count: Tensor | None,
    kind: int,
    scale: float,
    probabilities: bool,
    rolled_query: Tensor | None,
    rolled: int,
) -> Attended:
    """ops.attend; `kind` counts in ops.UNITS. Probabilities are as wide as a row's slots."""
    native, rows, heads, device = compiled_cuda(), a["R"], a["H"], kv.device
    q = _in_words(q)
    other = None if rolled_query is None else _in_words(rolled_query)
    width = a["P"] * a["S"] if probabilities else 0
    result = Attended(
        out=torch.empty_like(q),
        attended=torch.empty(rows, heads, dtype=torch.int32, device=device),
        read=torch.empty(rows, a["G"], dtype=torch.int32, device=device),
        probabilities=torch.empty(rows, heads, width, dtype=torch.float32, device=device)
        if probabilities
        else None,
        lse=torch.empty(rows, heads, dtype=torch.float32, device=device),
    )
    weights = result.probabilities
    size = native.attend_workspace_bytes(rows, heads, a["D"])
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    counters = _zero_counters(device, rows * heads)
    launch, pages = _launch(kv), a.pages(native, kv, page_table)
    selection = a.selection(native, index, count, kind)
    native.attend(
        launch,
        pages,
        q.data_ptr(),
        0 if other is None else other.data_ptr(),
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
        counters.data_ptr(),
        workspace.data_ptr(),
    )
    named = {} if index is None or count is None else {"index": index, "count": count}
    look = (
        None
        if index is None
        else lambda: native.check_lists(launch, pages, lengths.data_ptr(), selection)
    )
    check(a, look, page_table=page_table, lengths=lengths, **named)
    return result


def decode(
    a: Arguments,
    q: Tensor,
    kv: Tensor,
    meta: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    keep: Tensor | None,
    radius_scale: float,
    kind: int,
    scale: float,
    k: Tensor | None,
    v: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
) -> Attended:
    """ops.decode in two kernels; `kind` counts in ops.REDUCTIONS."""
    native, rows, heads, device = compiled_cuda(), a["R"], a["H"], kv.device
    token = [None if x is None else _in_words(x) for x in (k, v, cos, sin)]
    q = _in_words(q)
    result = Attended(
        out=torch.empty(rows, heads, a["D"], dtype=q.dtype, device=device),
        attended=torch.empty(rows, heads, dtype=torch.int32, device=device),
        read=torch.empty(rows, a["G"], dtype=torch.int32, device=device),
        probabilities=None,
        lse=torch.empty(rows, heads, dtype=torch.float32, device=device),
    )
    pages = a.pages(native, kv, page_table, meta)
    size = native.decode_workspace_bytes(pages, heads, kind)
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    counters = _zero_counters(device, rows * heads)
    native.decode(
        _launch(kv),
        pages,
        *one_token(native, q, *token),
        heads,
        lengths.data_ptr(),
        0 if keep is None else keep.data_ptr(),
        radius_scale,
        kind,
        scale,
        result.out.data_ptr(),
        result.attended.data_ptr(),
        result.read.data_ptr(),
        result.lse.data_ptr(),
        counters.data_ptr(),
        workspace.data_ptr(),
    )
    named = {"page_table": page_table, "lengths": lengths}
    check(a, None, **named if keep is None else {**named, "keep": keep})
    return result


def pack(
    a: Arguments, packed: Packed, kv: Tensor, page_table: Tensor, keys: Tensor, values: Tensor
) -> None:
    """ops.pack."""
    native = compiled_cuda()
    pages, held = a.pages(native, kv, page_table), a.packed(native, packed)
    native.pack(_launch(kv), pages, held, keys.data_ptr(), values.data_ptr())
    check(a, None, page_table=page_table, **_named(packed))


def attend_packed(
    a: Arguments,
    q: Tensor,
    kv: Tensor,
    packed: Packed,
    page_table: Tensor,
    lengths: Tensor,
    index: Tensor | None,
    count: Tensor | None,
    kind: int,
    scale: float,
) -> Attended:
    """ops.attend_packed; `kind` counts in ops.UNITS."""
    native, rows, heads, device = compiled_cuda(), a["R"], a["H"], kv.device
    q = _in_words(q)
    result = Attended(
        out=torch.empty_like(q),
        attended=torch.empty(rows, heads, dtype=torch.int32, device=device),
        read=torch.empty(rows, a["G"], dtype=torch.int32, device=device),
        probabilities=None,
        lse=torch.empty(rows, heads, dtype=torch.float32, device=device),
    )
    size = native.attend_workspace_bytes(rows, heads, a["D"])
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    counters = _zero_counters(device, rows * heads)
    launch, pages = _launch(kv), a.pages(native, kv, page_table)
    selection = a.selection(native, index, count, kind)
    native.attend_packed(
        launch,
        pages,
        a.packed(native, packed),
        q.data_ptr(),
        heads,
        lengths.data_ptr(),
        selection,
        scale,
        result.out.data_ptr(),
        result.attended.data_ptr(),
        result.read.data_ptr(),
        result.lse.data_ptr(),
        counters.data_ptr(),
        workspace.data_ptr(),
    )
    named = {} if index is None or count is None else {"index": index, "count": count}
    look = (
        None
        if index is None
        else lambda: native.check_lists(launch, pages, lengths.data_ptr(), selection)
    )
    check(a, look, page_table=page_table, lengths=lengths, **named, **_named(packed))
    return result


def _named(packed: Packed) -> dict[str, Tensor]:
    """What a fault of packed tokens names."""
    names = ("table", "keys", "values")
    named = {f"packed.{name}": getattr(packed, name) for name in names}
    return named if packed.nuq is None else {**named, "packed.nuq.starts": packed.nuq.starts}


def token_scores(
    a: Arguments, q: Tensor, kv: Tensor, page_table: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    """ops.token_scores, as wide as a row's slots."""
    native, q = compiled_cuda(), _in_words(q)
    width = a["P"] * a["S"]
    scores = torch.empty(a["R"], a["H"], width, dtype=torch.float32, device=kv.device)
    native.token_scores(
        _launch(kv),
        a.pages(native, kv, page_table),
        q.data_ptr(),
        a["H"],
        lengths.data_ptr(),
        scale,
        scores.data_ptr(),
        width,
    )
    check(a, page_table=page_table, lengths=lengths)
    return scores


def gather(a: Arguments, kv: Tensor, page_table: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """ops.gather."""
    native = compiled_cuda()
    k = torch.empty(a["R"], a["G"], length, a["D"], dtype=kv.dtype, device=kv.device)
    v = torch.empty_like(k)
    pages = a.pages(native, kv, page_table)
    native.gather(_launch(kv), pages, length, k.data_ptr(), v.data_ptr())
    check(a, page_table=page_table)
    return k, v


def _launch(tensor: Tensor) -> object:
    """Where and on which stream an op runs."""
    device = tensor.device
    stream = torch.cuda.current_stream(device).cuda_stream
    return compiled_cuda().Launch(device.index, stream, fault_of(device).data_ptr())


def _in_words(x: Tensor) -> Tensor:
    """The tensor itself where the kernels can load its rows in whole words, else a copy."""
    size = x.element_size()
    steps = [s * size for s, many in zip(x.stride()[:-1], x.shape[:-1], strict=True) if many > 1]
    if any(step % WORD for step in (x.data_ptr(), *steps)):
        return x.clone(memory_format=torch.contiguous_format)
    return x


def _zero_counters(device: torch.device, many: int) -> Tensor:
    """Counters for `attend` and `decode`, which leave them zero; calls on one stream share them.

    Hold them until the launch: another thread's call may put others in their place. Each capture
    of a graph gets its own, zeroed when a replay starts: it may run beside what this stream does by
    then.
    """
    stream = torch.cuda.current_stream(device).cuda_stream
    capture = compiled_cuda().capture_id(stream)
    place = (device, stream, capture != 0)
    before, kept = _counters.get(place, (0, None))
    if kept is None or kept.numel() < many or before != capture:
        kept = torch.zeros(max(many, 4096), dtype=torch.int32, device=device)
        _counters[place] = (capture, kept)
    return kept
