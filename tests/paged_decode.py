"""FlashInfer's paged decode as its documentation defines it, in plain torch, where it cannot run.

It stands in for the library alone: what it is handed is ours. As in the library, a decode for a
graph keeps its number of requests and reads the buffers that it was made with; the log sum exp is
to base 2.
"""

from __future__ import annotations

import itertools
import math
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor


class BatchDecodeWithPagedKVCacheWrapper:
    """The part of the library's class that is used, with its names."""

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: Tensor | None = None,
        paged_kv_indices_buffer: Tensor | None = None,
        paged_kv_last_page_len_buffer: Tensor | None = None,
    ) -> None:
        assert kv_layout == "HND"
        assert float_workspace_buffer.count_nonzero() == 0
        self.fixed = use_cuda_graph
        self.buffers = (
            paged_kv_indptr_buffer,
            paged_kv_indices_buffer,
            paged_kv_last_page_len_buffer,
        )
        assert all((buffer is not None) == use_cuda_graph for buffer in self.buffers)

    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
        sm_scale: float,
    ) -> None:
        given = (indptr, indices, last_page_len)
        assert all(x.dtype == torch.int32 and x.is_contiguous() for x in given)
        if self.fixed:
            for buffer, x in zip(self.buffers, given, strict=True):
                assert buffer is not None
                assert buffer.shape == x.shape
                buffer.copy_(x)
        else:
            self.buffers = given
        self.heads, self.kv_heads, self.scale = num_qo_heads, num_kv_heads, sm_scale
        self.page = (num_kv_heads, page_size, head_dim)
        self.dtypes = (q_data_type, kv_data_type)

    def run(
        self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], return_lse: bool = False
    ) -> Any:
        """Attention of q [B, query heads, D]."""
        indptr, indices, last_page_len = self.buffers
        keys, values = paged_kv_cache
        assert (q.dtype, keys.dtype) == self.dtypes
        assert keys.stride() == values.stride()
        assert keys.shape[1:] == values.shape[1:] == self.page
        bounds = indptr.tolist()
        assert q.shape[:2] == (len(bounds) - 1, self.heads)
        of = torch.arange(self.heads) // (self.heads // self.kv_heads)
        out, lse = torch.empty_like(q), torch.empty(q.shape[:2], dtype=torch.float64)
        for b, (start, end) in enumerate(itertools.pairwise(bounds)):
            pages, last = indices[start:end].long(), int(last_page_len[b])
            assert 1 <= last <= self.page[1]
            held = (len(pages) - 1) * self.page[1] + last
            k, v = (
                x[pages]
                .double()
                .transpose(0, 1)
                .reshape(self.kv_heads, -1, self.page[2])[of, :held]
                for x in (keys, values)
            )
            scores = (k @ q[b].double()[:, :, None])[:, :, 0] * self.scale
            out[b] = (scores.softmax(-1)[:, None] @ v)[:, 0].to(q.dtype)
            lse[b] = scores.logsumexp(-1) / math.log(2)
        return (out, lse) if return_lse else out


def install(patch: pytest.MonkeyPatch) -> None:
    """Let it be found as the library."""
    module = ModuleType("flashinfer")
    module.BatchDecodeWithPagedKVCacheWrapper = BatchDecodeWithPagedKVCacheWrapper  # type: ignore[attr-defined]
    patch.setitem(sys.modules, "flashinfer", module)
