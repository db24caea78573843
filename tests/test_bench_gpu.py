"""The attention benchmark on a GPU: its choice, plan, passes, rivals and figures, and a run."""

from __future__ import annotations

import math
from dataclasses import replace

import gpu
import paged_decode
import pytest
import torch
from bench_points import H100, TINY, options, tiny

from quest_dist import attention_sides as sides
from quest_dist import graphs, on_flashinfer, ops
from quest_dist.bench import attention
from quest_dist.bench.attention_figures import GpuFigures
from quest_dist.bench.attention_plan import planned
from quest_dist.bench.attention_table import Outcome, table
from quest_dist.bench.flashinfer_sides import DENSE, FlashInferSides, PageIds
from quest_dist.bench.places import chosen_place
from quest_dist.page_requests import page_requests
from quest_dist.shapes import SHAPES, Point, Shape
from quest_dist.timing import Rotation, Side, Times


def test_a_gpu_is_chosen_only_where_it_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("importlib.metadata.version", lambda package: "2.13.0+cu130")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert chosen_place(None) == chosen_place("cpu")
    with pytest.raises(ValueError, match="--device=cuda: torch finds no CUDA device"):
        chosen_place("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("importlib.metadata.version", lambda package: "2.13.0+cpu")
    with pytest.raises(ValueError, match=r"--device=cuda: torch 2\.13\.0\+cpu was built without"):
        chosen_place("cuda")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert chosen_place(None).device.type == "cpu"
    with pytest.raises(ValueError, match=r"--device=cuda: quest_dist\._cuda is not built; run"):
        chosen_place("cuda")


def test_the_default_grid_of_a_gpu_fits_and_outgrows_its_cache() -> None:
    plan = planned(options([]), H100)
    assert plan.record is not None
    assert max(plan.memory(point) for point in (*plan.points, *plan.sharing)) < 12e9
    for point in plan.points:
        least = point.score_bytes(plan.dtype)
        assert (plan.layers(point) - 1) * least >= 4 * H100.cache
        if not point.shared:
            assert (plan.copies(point) - 1) * point.dense_bytes(plan.dtype) >= 4 * H100.cache
    quick = planned(options(["--quick", "--dtype", "float16"]), H100)
    assert [str(point) for point in (*quick.points, *quick.sharing)] == [
        "7b at 32768 tokens",
        "8b at 32768 tokens",
        "8b at 131072 tokens",
        "7b at 32768 tokens, shuffled",
        "8b at 32768 tokens, shuffled",
        "8b at 131072 tokens, shuffled",
    ]
    assert all((2048, "max") in point.quests for point in quick.points)


def test_a_pass_takes_every_buffer_as_often_and_its_pieces_add_up() -> None:
    seen: list[tuple[str, int]] = []
    steps = {name: lambda buffer, name=name: seen.append((name, buffer)) for name in "abc"}
    side = Side("s", steps, (8, 0, 4), Rotation(5))  # type: ignore[arg-type]
    assert graphs.calls_of(side) == 35
    graphs.one_pass(side, 2)()
    assert seen == [(name, call % 5) for call in range(35) for name in "ab"]
    assert graphs.calls_of(Side("s", steps, (8, 0, 4), Rotation(100))) == 100  # type: ignore[arg-type]

    passes: list[int] = []

    def record(run: graphs.Pass) -> graphs.Clocked:
        seen.clear()
        run()
        first = len(seen) // 35  # this pass's steps a call
        passes.append(first)
        return lambda many: [35.0 * (10 * first + first**2 + turn) for turn in range(many)]

    times = graphs.measure_passes([side], 0.0, record)
    assert passes == [1, 2, 3]
    assert times.us("s")[0] == [39.0, 40.0, 41.0]
    assert times.us("s", "a")[0] == [11.0, 12.0, 13.0]
    assert times.us("s", "b")[0] == [13.0, 13.0, 13.0]
    assert times.us("s", "c")[0] == [15.0, 15.0, 15.0]


def test_passes_are_timed_where_calls_return() -> None:
    plan = replace(tiny(torch.bfloat16), record=graphs.direct)
    plan = replace(plan, figures=GpuFigures(context=256, budget=64, long=512))
    report = attention.measured(replace(plan, points=plan.points[1:2], sharing=()))
    assert report.summary["quest_us_8b_32k"] > 0
    assert report.summary["quest_vs_dense_8b_32k"] > 0
    assert report.summary["quest_us_8b_128k"] is None
    assert report.summary["quest_vs_flashinfer_8b_32k"] is None
    assert report.setting["timing"] == attention.PASSES


@pytest.mark.parametrize("lists", ["max", "per_query"])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_ids_of_pages_are_those_of_requests(lists: ops.Reduce, kv_heads: int) -> None:
    point = Point(Shape("", "", 4, kv_heads, 32), 256, rows=3)
    cache = sides.filled(point, 1, torch.float32)
    step = sides.QuestStep(cache, 64, lists)
    step.score(0)
    step.select(0)
    step.index = torch.nn.functional.pad(step.index, (0, 12), value=-1)  # as wide as on a GPU
    place = (cache.kv[0], 4, cache.table, cache.lengths)
    requests = page_requests(*place, step.index, step.count)
    used = int(requests.indptr[-1])
    assert used == 4 * (len(requests.indptr) - 1)
    ids = torch.full_like(requests.indices, -1)
    PageIds(cache, step.index.shape[1]).write(step.listed(), ids)
    assert torch.equal(ids[:used], requests.indices[:used])
    assert (ids[used:] == -1).all()
    step.attend(0)
    assert len(step.sides(Rotation(1))) == 2


def test_sides_of_flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    paged_decode.install(monkeypatch)
    point = Point(Shape("", "", 8, 2, 32), 256, rows=3)
    cache = sides.filled(point, 2, torch.float32)
    rotation = Rotation(2)
    rival = FlashInferSides(cache, rotation)
    dense = rival.dense()
    assert [side.name for side in dense] == list(DENSE)
    for lists in ("max", "per_query"):
        step = sides.QuestStep(cache, 64, lists)  # type: ignore[arg-type]
        _, pieces = step.sides(rotation)
        side = rival.quest(step, pieces)
        assert list(side.steps) == ["score", "select", "ids", "attend"]
        for layer in range(2):  # other queries, hence other lists, written into the same buffers
            for run in side.steps.values():
                out = run(layer)
            ours = [run(layer) for run in pieces.steps.values()]
            assert len(ours) == 3
            sides.same("quest", out, step.attended.out)  # type: ignore[arg-type]
    ours = ops.attend(cache.q[1], cache.kv[1], cache.table, cache.lengths).out
    for side in dense:
        sides.same(side.name, side.steps["attend"](1), ours)  # type: ignore[arg-type]


def timed_as(point: Point, us: dict[str, float]) -> Outcome:
    """An outcome whose sides took so long in every call, and moved 1000 bytes."""
    visits = {name: [[(time,), (time,)]] * 3 for name, time in us.items()}
    return Outcome(point, Times(visits, {name: {"x": 1000} for name in us}))


def test_figures_of_a_gpu() -> None:
    short, long, mha = (
        Point(SHAPES[name], context)
        for name, context in (("8b", 32768), ("8b", 131072), ("7b", 32768))
    )
    outcomes = [
        timed_as(
            short,
            {
                **{"read": 2.5, "copy": 2.0, "dense": 63, "sdpa gqa": 90},
                **{"flashinfer CUDA cores": 80, "flashinfer tensor cores": 60},
                **{"quest 2048 max": 15, "pieces 2048 max": 20},
                **{"quest on flashinfer 2048 max": 30, "quest 2048 per_query": 35},
            },
        ),
        timed_as(long, {"read": 2, "copy": 2, "dense": 220, "quest 2048 max": 22}),
        timed_as(replace(mha, rows=8), {"read": 2, "copy": 2, "dense": 9, "quest 2048 max": 9}),
    ]
    summary = GpuFigures().summary(outcomes)
    assert list(summary)[:6] == list(GpuFigures.targets)
    assert summary["quest_us_8b_32k"] == 15
    assert summary["quest_vs_flashinfer_8b_32k"] == 4
    assert summary["dense_vs_flashinfer_8b_32k"] == pytest.approx(1.05)
    assert summary["quest_vs_quest_on_flashinfer_8b_32k"] == 2
    assert summary["quest_vs_sdpa_8b_32k"] == 6
    assert summary["dense_vs_copy_8b_32k"] == pytest.approx(2 / 63)
    assert summary["quest_us_8b_128k"] == 22
    assert summary["quest_vs_dense_8b_128k"] == 10
    assert summary["quest_vs_flashinfer_8b_128k"] is None
    assert summary["quest_vs_dense_7b_32k"] is None  # eight rows are another point
    assert summary["copy_gbs"] == 0.5

    columns, rows = table(outcomes)
    found = [dict(zip(columns, row, strict=True)) for row in rows]
    rival = next(row for row in found if row["what"] == "quest on flashinfer")
    assert (rival["budget"], rival["lists"], rival["x flashinfer"]) == (2048, "max", 2)
    best = next(row for row in found if row["what"] == "flashinfer tensor cores")
    assert (best["budget"], best["x flashinfer"], best["x dense"]) == ("all", 1, 1.05)
    assert best["% of bandwidth"] == pytest.approx(100 * 2 / 60)
    assert next(row for row in found if row["what"] == "copy")["x dense"] is None
    assert table(outcomes[1:])[0][-1] == "x sdpa"


@pytest.mark.gpu
@pytest.mark.skipif(not gpu.available, reason="needs a CUDA device")
@pytest.mark.skipif(torch.version.cuda is None, reason="needs torch + CUDA")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_tiny_run_on_a_gpu(dtype: torch.dtype) -> None:
    plan = replace(tiny(dtype, "cuda"), record=graphs.graph)
    shapes = {name: replace(shape, head_dim=64) for name, shape in TINY.items()}
    points = [replace(point, shape=shapes[point.shape.name]) for point in plan.points]
    figures = GpuFigures(context=256, budget=64, long=512)
    points.append(replace(points[1], context=512))
    report = attention.measured(replace(plan, points=tuple(points), sharing=(), figures=figures))
    known = {name: value for name, value in report.summary.items() if value is not None}
    missing = set(report.summary) - set(known)
    assert all("flashinfer" in name for name in missing)
    assert not missing or on_flashinfer.version() is None
    assert all(math.isfinite(value) and value > 0 for value in known.values())
