"""decode on a GPU: fp16 and wide heads, wrong values, calls that follow closely, graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gpu
import pytest
import torch
from new_tokens import KEEPS, assert_same, decoded, in_pieces, new_token, pages, same
from pools import Case, close, name
from torch import Tensor

from quest_dist import faults, ops, reference

pytestmark = gpu.needs_gpu
needs_torch_with_cuda = pytest.mark.skipif(torch.version.cuda is None, reason="needs torch + CUDA")

OTHERS = [Case(torch.float16, g, s, d) for g, s, d in ((1, 16, 64), (4, 16, 128), (5, 32, 72))] + [
    Case(d, g, 16, 256) for d, g in ((torch.float32, 2), (torch.bfloat16, 9))
]


@pytest.mark.parametrize("case", OTHERS, ids=name)
def test_types_and_widths_that_the_cpu_does_not_have(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.move_ops(monkeypatch)
    for kind in KEEPS:
        keep = pages(case, kind)
        for reduce in ops.REDUCTIONS:
            ours, theirs = new_token(case).copy(), new_token(case).copy()
            got = decoded(ours, "append rotate", keep, reduce=reduce)
            assert_same(got, in_pieces(theirs, "append rotate", keep, reduce))
            assert same(ours.kv, theirs.kv)
            assert same(ours.meta, theirs.meta)
    token, keep = new_token(case).copy(), pages(case, "mixed")
    exact = (token.kv.double(), token.meta.double(), token.table, token.lengths)
    new = {"k": token.k.double(), "v": token.v.double()}
    want = reference.decode(token.q.double(), *exact, keep, **new)
    assert close(decoded(token, "append", keep).out, want.out, case.dtype)


def test_wrong_values_are_never_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.move_ops(monkeypatch)
    monkeypatch.setattr(faults, "debug", False)
    case = Case(torch.float32, 3, 16)
    token, keep = new_token(case).copy(), torch.full((7,), 2, dtype=torch.int32)
    right = decoded(token.copy(), "append rotate", keep)
    wrong = token.copy()
    wrong.table, wrong.lengths, keep = wrong.table.clone(), wrong.lengths.clone(), keep.clone()
    wrong.table[0] = 10**6
    wrong.lengths[1], wrong.lengths[2] = -5, 10**9
    keep[3] = 0
    for reduce in ops.REDUCTIONS:
        before = wrong.copy()
        got = decoded(before, "append rotate", keep, reduce=reduce)
        assert (got.out[:4] == 0).all()
        assert (got.lse[:4] == -torch.inf).all()
        assert (got.attended[1:4] == 0).all()
        assert (got.read[1:4] == 0).all()
        if reduce == "max":
            assert torch.equal(got.out[4:], right.out[4:])
        untouched = wrong.table[:3].clamp(0, len(wrong.kv) - 1)[1:].long()
        assert same(before.kv[untouched], wrong.kv[untouched])
    with pytest.raises(ValueError, match="met a wrong value of lengths"):
        faults.check_faults(torch.device(gpu.there(token.q).device))


class Model:
    """Layers of one pool on the GPU, whose rows grow token by token."""

    def __init__(self, layers: int, start: int, steps: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(8)
        self.start, self.steps, self.layers = start, steps, layers
        self.kv, self.meta = ops.allocate_pages(layers, 80, 2, 16, 64, dtype, "cuda")
        self.table = torch.arange(80, dtype=torch.int32, device="cuda").view(2, 40)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype).cuda()

        self.k, self.v = (random(layers, 2, 2, start + steps, 64) for _ in range(2))
        self.q = random(steps, layers, 2, 8, 64)
        angle = torch.rand(start + steps, 32, generator=generator).repeat(1, 2)
        self.cos, self.sin = angle.cos().cuda(), angle.sin().cuda()
        # What a graph reads: written between its replays.
        self.lengths = torch.full((2,), start, dtype=torch.int32, device="cuda")
        self.keep = torch.full((2,), 6, dtype=torch.int32, device="cuda")
        self.now = [self.q[0], self.k[:, :, :, 0], self.v[:, :, :, 0], self.cos[:1], self.sin[:1]]
        self.now = [x.expand(2, -1).clone() if x.dim() == 2 else x.clone() for x in self.now]

    def step(self, reduce: ops.Reduce = "max", pieces: bool = False) -> list[ops.Attended]:
        """The new token through all layers, without waiting."""
        results = []
        q, k, v, cos, sin = self.now
        for i in range(self.layers):
            place = (self.kv[i], self.meta[i], self.table, self.lengths)
            if not pieces:
                new: dict[str, Any] = {"k": k[i], "v": v[i], "cos": cos, "sin": sin}
                results.append(ops.decode(q[i], *place, self.keep, reduce=reduce, **new))
                continue
            one, key = (reference.rotate(x, cos, sin) for x in (q[i], k[i]))
            ops.append(*place[:3], key[:, :, None], v[i][:, :, None], self.lengths - 1)
            scores = ops.page_scores(one, *place, reduce=reduce)
            index, count = ops.select_top(scores, (self.lengths - 1) // 16 + 1, self.keep, True)
            results.append(ops.attend(one, place[0], *place[2:], index, count))
        return results

    def run(self, call: Callable[[], list[ops.Attended]]) -> list[list[ops.Attended]]:
        """All steps from the start."""
        self.kv.fill_(torch.nan)
        self.meta.fill_(torch.nan)
        for i in range(self.layers):
            tokens = (self.k[i][:, :, : self.start], self.v[i][:, :, : self.start])
            ops.append(self.kv[i], self.meta[i], self.table, *tokens, self.lengths * 0)
        outs = []
        for i in range(self.steps):
            self.lengths.fill_(self.start + i + 1)
            # One row stays below its budget for a while, and another is never limited.
            self.keep.copy_(torch.tensor([6 if i % 3 else 30, 6]))
            at = self.start + i
            fresh = (self.q[i], self.k[:, :, :, at], self.v[:, :, :, at])
            for to, x in zip(self.now, (*fresh, self.cos[at], self.sin[at]), strict=True):
                to.copy_(x)
            outs.append(
                [ops.Attended(*(None if x is None else x.clone() for x in one)) for one in call()]
            )
        torch.cuda.synchronize()
        return outs


def assert_steps_same(got: list[list[ops.Attended]], want: list[list[ops.Attended]]) -> None:
    for ours, theirs in zip(got, want, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert_same(a, b)


@needs_torch_with_cuda
@pytest.mark.parametrize("reduce", ops.REDUCTIONS)
def test_layers_that_follow_closely_share_workspace_and_counters(reduce: ops.Reduce) -> None:
    model = Model(layers=24, start=75, steps=40, dtype=torch.bfloat16)
    want = model.run(lambda: model.step(reduce, pieces=True))
    for _ in range(3):
        assert_steps_same(model.run(lambda: model.step(reduce)), want)


@needs_torch_with_cuda
@pytest.mark.parametrize("reduce", ops.REDUCTIONS)
def test_a_graph_replays_while_rows_grow_past_their_budget(reduce: ops.Reduce) -> None:
    """Captured at 75 tokens, five pages: what 6 pages hold. Replayed up to 195, thirteen pages."""
    model = Model(layers=3, start=75, steps=120, dtype=torch.bfloat16)
    eager = model.run(lambda: model.step(reduce))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = model.step(reduce)

    def replay() -> list[ops.Attended]:
        graph.replay()
        return outs

    assert_steps_same(model.run(replay), eager)
    assert_steps_same(model.run(replay), eager)  # the counters are left zero


@needs_torch_with_cuda
def test_two_kernels_a_layer() -> None:
    model = Model(layers=3, start=75, steps=1, dtype=torch.bfloat16)
    model.run(model.step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model.step()
    for call, others in ((model.step, 0), (graph.replay, 1)):  # a graph zeroes its counters once
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
            call()
            torch.cuda.synchronize()
        kernels = [e.name for e in seen.events() if e.device_type == torch.profiler.DeviceType.CUDA]
        ours = [one for one in kernels if "quest" in one]
        assert ["scores" in one for one in ours] == [True, False] * 3
        assert len(kernels) - len(ours) <= others
