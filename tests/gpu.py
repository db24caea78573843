"""The GPU for tests written with tensors on the CPU: arguments go there, results come back.

Where the CPU sizes a result by values and a GPU by shapes, what is beyond the values must be the
padding, and is cut off.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from quest_dist import faults, ops
from quest_dist.backend import by_reference, compiled_cuda
from quest_dist.packing import Nuq, Packed

available = torch.cuda.is_available()
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not available, reason="needs a CUDA device")]
MOVED = (
    "append",
    "page_scores",
    "select_top",
    "attend",
    "token_scores",
    "gather",
    "decode",
    "prefill_attend",
    "pack",
    "attend_packed",
)


def there(x: Any) -> Any:
    """A tensor on the GPU with the same strides; anything else as it is."""
    if isinstance(x, Packed | Nuq):
        return type(x)(*map(there, x))
    if not isinstance(x, Tensor) or x.is_cuda:
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda").copy_(x)


def back(x: Any) -> Any:
    """A tensor on the CPU; anything else as it is."""
    return x.cpu() if isinstance(x, Tensor) else x


def cut(x: Tensor, width: int, padding: float) -> Tensor:
    """The first `width` columns, the others being padding."""
    assert (x[..., width:] == padding).all()
    return x[..., :width].contiguous()


def moved(name: str) -> Callable[..., Any]:
    """The op on the GPU, for tensors on the CPU."""
    op = getattr(ops, name)

    def run(*args: Any, **options: Any) -> Any:
        if by_reference():
            return op(*args, **options)
        tensors = [x for x in args if isinstance(x, Tensor)]
        if any(x.dim() == 5 and x.shape[-1] % 8 for x in tensors):  # kv
            pytest.skip("a GPU takes head dimensions that are multiples of 8")
        sent = [there(x) for x in args]
        got = op(*sent, **{key: there(x) for key, x in options.items()})
        written = {"append": slice(0, 2), "decode": slice(1, 3)}.get(name, slice(0))
        for here, x in zip(args[written], sent[written], strict=True):
            here.copy_(x)
        if name == "pack":
            args[0].blocks.copy_(sent[0].blocks)
        if got is None:
            return None
        if isinstance(got, Tensor):
            got = got.cpu()
            if name == "token_scores":
                lengths = options.get("lengths", args[3] if len(args) > 3 else None)
                got = cut(got, int(lengths.max()), -math.inf)
            return got
        got = type(got)(*map(back, got)) if hasattr(got, "_fields") else tuple(map(back, got))
        if name == "select_top":
            return cut(got[0], max(0, int(got[1].max())), -1), got[1]
        if name == "attend" and got.probabilities is not None:
            longest = int(got.attended.max())
            got = got._replace(probabilities=cut(got.probabilities, longest, 0.0))
        return got

    return run


def move_ops(patch: pytest.MonkeyPatch) -> None:
    """Let the ops run on the GPU, checking values as the CPU does."""
    compiled_cuda().warm_up(torch.cuda.current_device())
    patch.setattr(faults, "debug", True)
    for name in MOVED:
        patch.setattr(ops, name, moved(name))
