"""A device that holds no data, for tests of what runs on a GPU where there is none.

Its tensors are torch's meta tensors: they have shapes and dtypes, and reading a value back (item,
tolist, a shape that depends on values) raises. `OneDevice` raises where an op mixes them with
tensors of the CPU. The ops check their arguments as ever; what their kernels would return is made
unfilled, of a GPU's sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from quest_dist import arguments, on_cpu
from quest_dist.arguments import Arguments
from quest_dist.reference import Attended

DEVICE = torch.device("meta")
#: What moves data from one device to another.
MOVES = ("aten::_to_copy", "aten::copy_", "aten::_has_compatible_shallow_copy_type")


class OneDevice(TorchDispatchMode):
    """Refuses ops over tensors on several devices, as CUDA does, except those that move data."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op if it may."""
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim()]
        devices = {str(x.device) for x in inputs}
        if len(devices) > 1 and func._schema.name not in MOVES:
            raise AssertionError(f"{func} mixes {', '.join(sorted(devices))}")
        return func(*args, **(kwargs or {}))


def ints(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int32, device=DEVICE)


def floats(*shape: int) -> Tensor:
    return torch.empty(shape, device=DEVICE)


def append(a: Arguments, *_: object) -> None:
    """It returns nothing."""


def page_scores(a: Arguments, *rest: object) -> Tensor:
    return floats(a["R"], a["G"] if rest[-2] else a["H"], a["P"])


def select_top(a: Arguments, *_: object) -> tuple[Tensor, Tensor]:
    return ints(a["R"], a["Hs"], a["M"]), ints(a["R"], a["Hs"])


def attend(a: Arguments, q: Tensor, *rest: object) -> Attended:
    weights = floats(a["R"], a["H"], a["P"] * a["S"]) if rest[7] else None
    heads, read = ints(a["R"], a["H"]), ints(a["R"], a["G"])
    return Attended(torch.empty_like(q), heads, read, weights, floats(a["R"], a["H"]))


def decode(a: Arguments, q: Tensor, *_: object) -> Attended:
    return attend(a, q, *[None] * 7, False)


def token_scores(a: Arguments, *_: object) -> Tensor:
    return floats(a["R"], a["H"], a["P"] * a["S"])


def gather(a: Arguments, kv: Tensor, table: Tensor, length: int) -> tuple[Tensor, Tensor]:
    k = kv.new_empty(a["R"], a["G"], length, a["D"])
    return k, torch.empty_like(k)


def pack(a: Arguments, *_: object) -> None:
    """It returns nothing."""


def attend_packed(a: Arguments, q: Tensor, *_: object) -> Attended:
    return attend(a, q, *[None] * 7, False)


KERNELS = (
    append,
    page_scores,
    select_top,
    attend,
    decode,
    token_scores,
    gather,
    pack,
    attend_packed,
)


@contextmanager
def installed(patch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Let the ops take tensors of the device that holds no data."""
    patch.setitem(arguments.LARGEST_HEAD, DEVICE.type, 256)
    for kernel in KERNELS:
        patch.setattr(on_cpu, kernel.__name__, kernel, raising=kernel is not decode)
    with OneDevice():
        yield DEVICE
