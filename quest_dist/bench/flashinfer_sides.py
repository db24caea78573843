"""FlashInfer's sides of the attention benchmark: dense decode, and Quest on its kernels.

All are planned here, once, and run in graphs: what FlashInfer's planning costs a step is not in
their times, nor is the log sum exp, which ours give. Dense runs on CUDA cores and on tensor cores;
`Quest on FlashInfer` scores and selects with our kernels, turns lists into ids of pages with two of
torch's, and attends over these as `page_requests` says.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quest_dist import ops
from quest_dist.attention_sides import Cache, QuestStep, same
from quest_dist.on_flashinfer import TENSOR_CORES_FROM, WORKSPACE_BYTES, Decode
from quest_dist.page_requests import PageRequests, page_requests
from quest_dist.timing import Rotation, Side

DENSE = ("flashinfer CUDA cores", "flashinfer tensor cores")
QUEST = "quest on flashinfer"


class FlashInferSides:
    """FlashInfer on one cache; its decodes share a workspace, as they run one after the other."""

    def __init__(self, cache: Cache, rotation: Rotation) -> None:
        """FlashInfer must be able to run there (`on_flashinfer.check`)."""
        self.cache, self.rotation = cache, rotation
        device = cache.q.device
        self.workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)

    def _planned(self, requests: PageRequests, tensor_cores: bool) -> Decode:
        cache = self.cache
        decode = Decode(cache.q.device, tensor_cores, requests, self.workspace)
        decode.plan(requests, cache.q[0], cache.kv[0], cache.q.shape[3] ** -0.5)
        return decode

    def dense(self) -> list[Side]:
        """Attention over every token, on both kinds of cores."""
        cache, shape = self.cache, self.cache.point.shape
        requests = page_requests(cache.kv[0], shape.heads, cache.table, cache.lengths)
        ours = ops.attend(cache.q[0], cache.kv[0], cache.table, cache.lengths).out
        sides = []
        for tensor_cores, name in enumerate(DENSE):
            decode = self._planned(requests, bool(tensor_cores))

            def attend(layer: int, decode: Decode = decode) -> Tensor:
                return decode.out(cache.q[layer], cache.kv[layer])

            same(f"{cache.point}, {name}", attend(0), ours)
            moved = (cache.point.dense_bytes(cache.q.dtype),)
            sides.append(Side(name, {"attend": attend}, moved, self.rotation))
        return sides

    def quest(self, step: QuestStep, pieces: Side) -> Side:
        """Quest with the `step` whose `pieces` were timed; its lists must be as long as planned."""
        cache = self.cache
        step.score(0)
        step.select(0)
        requests = page_requests(
            cache.kv[0], cache.point.shape.heads, cache.table, cache.lengths, step.index, step.count
        )
        decode = self._planned(requests, requests.group >= TENSOR_CORES_FROM)
        ids = PageIds(cache, step.index.shape[1])

        def listed(_: int) -> None:
            ids.write(step.listed(), decode.indices)

        def attend(layer: int) -> Tensor:
            return decode.out(cache.q[layer], cache.kv[layer])

        listed(0)
        step.attend(0)
        same(f"{cache.point}, {QUEST}", attend(0), step.attended.out)
        score, select, attended = pieces.moved
        steps = {"score": step.score, "select": step.select, "ids": listed, "attend": attend}
        name = f"{QUEST} {step.budget} {step.lists}"
        return Side(name, steps, (score, select, 0, attended), self.rotation)


class PageIds:
    """The ids under which requests know the pages of lists, for lists of one length."""

    def __init__(self, cache: Cache, lists: int) -> None:
        """`lists` of a row: one a kv head or a query head."""
        kv_heads = cache.point.shape.kv_heads
        device, (rows, slots) = cache.table.device, cache.table.shape
        heads = torch.arange(kv_heads, dtype=torch.int32, device=device)
        self.of = (cache.table[:, None] * kv_heads + heads[:, None]).flatten()
        first = torch.arange(rows * kv_heads, dtype=torch.int32, device=device) * slots
        self.starts = first.view(rows, kv_heads, 1).repeat_interleave(lists // kv_heads, 1)

    def write(self, listed: Tensor, ids: Tensor) -> None:
        """Those of `listed` [R, Hs, pages] at the beginning of `ids`."""
        places = (listed + self.starts).flatten()
        torch.index_select(self.of, 0, places, out=ids[: places.numel()])
