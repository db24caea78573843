"""Attention over pages through FlashInfer: the one door to that library, and optional.

It stands beside our kernels for the dense layers, `full` and every method whose lists are of pages:
another hand's kernels under the same selection, so a check of ours and a fair rival. A list of
pages is a request of its own (`page_requests`), so FlashInfer's kernels are used as they are.

FlashInfer runs on CUDA devices alone, compiles itself when first used (nvcc and ninja; minutes)
and plans a call on the host. `attend` therefore waits for the device in every call and cannot be
captured in a CUDA graph; a `Decode` that is planned beforehand can.

Shape letters as in `ops`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from quest_dist.arguments import Arguments
from quest_dist.page_requests import PageRequests, page_requests, request_pages
from quest_dist.reference import Attended

DTYPES = ("float16", "bfloat16")
HEAD_DIMS = (64, 128, 256)
#: From so many query heads a kv head on, FlashInfer's tensor-core kernel is the faster one; its
#: other kernel takes groups of 1, 2, 3, 4, 6 and 8 only.
TENSOR_CORES_FROM = 4
WORKSPACE_BYTES = 128 << 20  # as FlashInfer recommends


def version() -> str | None:
    """The release that is installed, or None."""
    if importlib.util.find_spec("flashinfer") is None:
        return None
    return importlib.metadata.version("flashinfer-python")


def check(device: str, dtype: str | None = None, head_dim: int | None = None) -> None:
    """ValueError, in one line, for what FlashInfer does not run on; None is not known yet.

    `device` is a type, as cpu or cuda; `dtype` a name, as bfloat16 or torch.bfloat16.
    """
    if device != "cuda":
        raise ValueError(f"backend=flashinfer runs on CUDA devices only, not on the {device}")
    if dtype is not None and dtype.removeprefix("torch.") not in DTYPES:
        raise ValueError(f"backend=flashinfer takes {' or '.join(DTYPES)}, not {dtype}")
    if head_dim is not None and head_dim not in HEAD_DIMS:
        choices = ", ".join(map(str, HEAD_DIMS))
        raise ValueError(f"backend=flashinfer takes head dimensions {choices}, not {head_dim}")
    if version() is None:
        raise ValueError(
            "backend=flashinfer: FlashInfer is not installed; pip install 'quest_dist[flashinfer]'"
        )


class Decode:
    """FlashInfer's paged decode of requests: planned as often as their sizes change, and run.

    One that is `fixed` to requests keeps their number and sizes, in buffers of its own, and can
    then be captured in a CUDA graph: `indices` may be written while it is replayed.
    """

    def __init__(
        self,
        device: torch.device,
        tensor_cores: bool,
        fixed: PageRequests | None = None,
        workspace: Tensor | None = None,
    ) -> None:
        """`workspace` may be shared by those that do not run at once."""
        flashinfer = importlib.import_module("flashinfer")
        if workspace is None:
            workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        buffers: dict[str, Any] = {}
        if fixed is not None:
            self.indices = fixed.indices.clone()
            buffers = {
                "use_cuda_graph": True,
                "paged_kv_indptr_buffer": fixed.indptr.clone(),
                "paged_kv_indices_buffer": self.indices,
                "paged_kv_last_page_len_buffer": fixed.last_page_len.clone(),
            }
        self._decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace, kv_layout="HND", use_tensor_cores=tensor_cores, **buffers
        )

    def plan(self, requests: PageRequests, q: Tensor, kv: Tensor, scale: float) -> None:
        """Share the requests out over the device: waits for it."""
        self._decode.plan(
            requests.indptr,
            requests.indices,
            requests.last_page_len,
            num_qo_heads=requests.heads,
            num_kv_heads=requests.kv_heads,
            head_dim=q.shape[2],
            page_size=kv.shape[3],
            q_data_type=q.dtype,
            kv_data_type=kv.dtype,
            sm_scale=scale,
        )
        self._kv_heads, self._apart = requests.kv_heads, (-1, requests.heads, q.shape[2])

    def out(self, q: Tensor, kv: Tensor) -> Tensor:
        """Attention of q [R, H, D] over the planned requests, [R, H, D]; launches only."""
        pages = request_pages(kv, self._kv_heads)
        out: Tensor = self._decode.run(q.view(self._apart), pages)
        return out.view_as(q)

    def out_and_lse(self, q: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and the log sum exp of the scaled scores, to base 2, fp32 [R, H]."""
        pages = request_pages(kv, self._kv_heads)
        out, lse = self._decode.run(q.view(self._apart), pages, return_lse=True)
        return out.view_as(q), lse.view(q.shape[:2])


@cache
def _decode(device: torch.device, stream: int, tensor_cores: bool) -> Decode:
    """Kept for each stream, as its workspace is written by all that runs there."""
    return Decode(device, tensor_cores)


def attend(
    a: Arguments,
    q: Tensor,
    kv: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    index: Tensor | None,
    count: Tensor | None,
    scale: float,
    probabilities: bool,
) -> Attended:
    """ops.attend over everything or over lists of pages, with the arguments checked there.

    Raises ValueError, in one line, for lists of tokens and probabilities, for what `check`
    refuses, and during the capture of a CUDA graph.
    """
    if index is not None and a.chosen["unit"] != "pages":
        raise a.refuse("unit", repr(a.chosen["unit"]), "'pages' through flashinfer")
    if probabilities:
        raise a.refuse("probabilities", "True", "False through flashinfer, which gives none")
    check(kv.device.type, str(kv.dtype), a["D"])
    if torch.cuda.is_current_stream_capturing():
        raise ValueError("backend=flashinfer plans on the host: a CUDA graph cannot hold it")
    requests = page_requests(kv, a["H"], page_table, lengths, index, count)
    stream = torch.cuda.current_stream(kv.device).cuda_stream
    decode = _decode(kv.device, stream, requests.group >= TENSOR_CORES_FROM)
    decode.plan(requests, q, kv, scale)
    out, lse = decode.out_and_lse(q, kv)
    return Attended(out, requests.attended, requests.read, None, lse * math.log(2))
