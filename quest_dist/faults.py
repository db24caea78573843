"""Faults: what an op on a GPU found wrong with values, said as the CPU's ops say it.

A kernel never follows an index that is out of range; it notes the first one of the call in one
number on the device (kernels/cuda/ops.h). With QUEST_DEBUG=1 every op outside of a graph's capture
waits for the device and raises a ValueError for it; otherwise `check_faults` is called when a wait
costs nothing, as after a sample.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

from quest_dist.arguments import Arguments
from quest_dist.backend import compiled_cuda

# The names that kernels/cuda/ops.h numbers from 1 on.
KINDS = (
    *("lengths", "page_table", "count", "index", "twice", "starts", "items", "keep"),
    *("packed.table", "packed.keys", "packed.values", "packed.nuq.starts"),
)

debug = os.environ.get("QUEST_DEBUG") == "1"

#: One a device, for as long as the process: kernels hold its address.
_faults: dict[torch.device, Tensor] = {}


def fault_of(device: torch.device) -> Tensor:
    """The number that a device's kernels note faults in; of the current one where it has no index.

    Raises RuntimeError where a graph's capture asks first: the number would be the graph's own.
    """
    device = _in_full(device)
    kept = _faults.get(device)
    if kept is None:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"the first op on {device} cannot be captured; run one before")
        none = torch.full((1,), compiled_cuda().NO_FAULT, dtype=torch.int64, device=device)
        kept = _faults.setdefault(device, none)  # another thread's, if it was first
    return kept


def check_faults(device: torch.device) -> None:
    """Wait for the device's current stream; ValueError if an op met an index out of range since
    last asked. Where no op has run there is nothing to wait for."""
    found = _take(device) if _in_full(device) in _faults else None
    if found is not None:
        raise ValueError(f"{_left(device, *found)}; QUEST_DEBUG=1 names the op and the value")


def check(a: Arguments, look: Callable[[], None] | None = None, **named: Tensor) -> None:
    """With QUEST_DEBUG=1: raise what the op just launched found; `look` launches more checks."""
    if not debug or torch.cuda.is_current_stream_capturing():
        return
    if look is not None:
        look()
    device = next(iter(named.values())).device
    found = _take(device)
    if found is None:
        return
    kind, at, column = KINDS[found[0]], found[1], found[2]
    tensor = named.get("index" if kind == "twice" else kind)
    if tensor is None:  # of no argument of this op
        raise ValueError(f"{_left(device, *found)}, in a graph or on another stream")
    place = [at, column][: tensor.dim()]
    if tensor.dim() == 3:
        place = [*divmod(at, tensor.shape[1]), column]
    value = int(tensor[tuple(place)])
    if kind in ("index", "twice"):
        raise ValueError(f"{a.op}: index: {_item(a, kind, value, place[0], named['lengths'])}")
    raise ValueError(f"{a.op}: {kind}{place} is {value}{_expected(a, kind)}")


def _in_full(device: torch.device) -> torch.device:
    """As tensors name it: of GPUs with its index."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _left(device: torch.device, kind: int, at: int, column: int) -> str:
    return f"an op on {device} met a wrong value of {KINDS[kind]} (place {at}, {column})"


def _item(a: Arguments, kind: str, value: int, row: int, lengths: Tensor) -> str:
    item = f"{a.chosen['unit'][:-1]} {value} of row {row}"
    if kind == "twice":
        return f"{item} is listed twice"
    last = int(lengths[row]) - 1
    return f"{item} is out of range 0..{last // a['S'] if a.chosen['unit'] == 'pages' else last}"


def _expected(a: Arguments, kind: str) -> str:
    size = a.sizes
    if kind == "lengths":
        return f", but a row of page_table holds 1..{size['P'] * size['S']} tokens"
    if kind == "page_table":
        return f", but the pool's pages are 0..{size['N'] - 1}"
    if kind == "count":
        return f"; expected 1..{size['K']}, or -1 for every token"
    if kind == "starts":
        slots = size["P"] * size["S"]
        return f": {size['n']} tokens from there do not fit the row's {slots} slots"
    if kind == "items":
        return f", but scores has {size['M']} a row"
    if kind == "packed.table":
        return f", but the blocks are 0..{size['B'] - 1}"
    if kind in ("packed.keys", "packed.values"):
        return "; expected no more than the row's tokens and blocks hold, keys in whole groups"
    if kind == "packed.nuq.starts":
        return f"; expected places in 0..{size['E']} that do not descend"
    return ", but force_last keeps at least the last item"


def _take(device: torch.device) -> tuple[int, int, int] | None:
    """The least fault noted, as its place in KINDS, `at` and `column`; forgotten once taken."""
    fault = fault_of(device)
    key = int(fault)
    if key == compiled_cuda().NO_FAULT:
        return None
    with torch.inference_mode():  # in which it may have been made
        fault.fill_(compiled_cuda().NO_FAULT)
    return (key >> 58) - 1, key >> 32 & 0x3FFFFFF, key & 0xFFFFFFFF
