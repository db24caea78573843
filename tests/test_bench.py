"""The benchmarks' clock, buffers and options, and a run of the attention benchmark in miniature."""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import weakref
from dataclasses import replace
from pathlib import Path

import gpu
import pytest
import torch

from quest_dist import on_flashinfer, ops
from quest_dist.bench import attention, graphs, sides, timing
from quest_dist.bench.__main__ import main
from quest_dist.bench.attention_figures import Figures, GpuFigures
from quest_dist.bench.attention_plan import Plan, planned
from quest_dist.bench.attention_table import Outcome, table
from quest_dist.bench.flashinfer_sides import PageIds
from quest_dist.bench.places import Place, chosen_place, last_level_cache
from quest_dist.bench.shapes import SHAPES, Point, Shape, parsed_size
from quest_dist.bench.timing import Rotation, Side, Times
from quest_dist.page_requests import page_requests

TINY = {
    "7b": Shape("7b", "tiny MHA", 4, 4, 32),
    "8b": Shape("8b", "tiny GQA", 4, 1, 32),
}
QUESTS = ((64, "max"), (64, "per_query"))


def tiny(dtype: torch.dtype, device: str = "cpu") -> Plan:
    """The summary's points and rows of both kinds, of a machine with 16 KB of cache."""
    points = [Point(TINY[name], 256, quests=QUESTS) for name in TINY]
    points += [Point(TINY["8b"], 256, 3, shared, QUESTS[:1]) for shared in (False, True)]
    sharing = [Point(TINY[name], 128, 5, shared=True) for name in TINY]
    place = Place(torch.device(device), 16 << 10, "the test")
    return Plan(tuple(points), tuple(sharing), dtype, 0.01, place, Figures(context=256, budget=64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_tiny_run_has_every_figure(dtype: torch.dtype, tmp_path: Path) -> None:
    report = attention.measured(tiny(dtype))
    report.show()
    report.write(tmp_path / "new" / "report.json")
    content = json.loads((tmp_path / "new" / "report.json").read_text())
    assert content["targets"] == Figures.targets
    assert list(content["summary"])[: len(Figures.targets)] == list(Figures.targets)
    assert all(math.isfinite(value) and value > 0 for value in content["summary"].values())
    seen = {(row["shape"], row["rows"], row["prefix"], row["what"]) for row in content["rows"]}
    for what in ("read", "dense", "quest", "score", "select", "attend", "sdpa gqa", "sdpa folded"):
        assert ("8b", 1, None, what) in seen
    assert ("7b", 1, None, "sdpa folded") not in seen  # a group of one query is not folded
    assert ("8b", 3, "separate", "sdpa gqa") in seen
    assert ("8b", 3, "shared", "sdpa gqa") not in seen  # it has no shared rows
    assert ("7b", 5, "shared", "dense, 5 calls") in seen
    for row in content["rows"]:
        assert 0 < row["p10"] <= row["us"] <= row["p90"]
    assert content["setting"]["flashinfer"].endswith("runs on CUDA devices only, not on the cpu")
    assert "x flashinfer" not in content["rows"][0]
    whole = next(row for row in content["rows"] if row["what"] == "pieces")
    parts = [row for row in content["rows"] if row["what"] in ("score", "select", "attend")][:3]
    assert sum(part["p10"] for part in parts) <= whole["p90"]


def test_shared_rows_and_single_calls_compute_the_same() -> None:
    cache = sides.filled(Point(TINY["8b"], 128, 5, shared=True), 5, torch.float32)
    together = ops.attend(cache.q[0], cache.kv[0], cache.table, cache.lengths).out
    for row in range(5):
        alone = ops.attend(
            cache.q[0, row, None], cache.kv[row], cache.table[row, None], cache.lengths[:1]
        )
        assert torch.equal(alone.out[0], together[row])
    assert len(set(cache.table[:, -1].tolist())) == 5
    assert cache.table[:, :-1].unique(dim=0).shape[0] == 1


def test_a_wrong_result_is_not_timed() -> None:
    cache = sides.filled(Point(TINY["8b"], 128), 2, torch.float32)
    sides.check_dense(cache)
    sides.QuestStep(cache, 64, "max").sides(Rotation(2))
    with pytest.raises(RuntimeError, match="quest attended to other than 72 tokens"):
        sides.QuestStep(cache, 72, "max").sides(Rotation(2))  # no whole number of pages
    with pytest.raises(RuntimeError, match="differs from torch SDPA"):
        sides.same("it", cache.q[0], cache.q[1])
    with pytest.raises(RuntimeError, match="differs from torch SDPA"):
        sides.same("it", torch.full((2,), math.nan), torch.ones(2))


def test_bytes_are_those_that_must_be_read() -> None:
    shape, dtype = SHAPES["8b"], torch.bfloat16
    assert shape.token_bytes(dtype) == 4096
    assert Point(shape, 32768).dense_bytes(dtype) == 32768 * 4096
    assert Point(shape, 32768).score_bytes(dtype) == 2047 * 4096
    assert Point(shape, 8192, 8).dense_bytes(dtype) == 8 * 8192 * 4096
    assert Point(shape, 8192, 8, shared=True).dense_bytes(dtype) == (8192 + 7 * 16) * 4096
    cache = sides.filled(Point(TINY["7b"], 256), 2, torch.float32)
    whole, pieces = sides.QuestStep(cache, 64, "max").sides(Rotation(2))
    assert pieces.moved == (15 * 1024, 0, 64 * 1024)
    assert whole.moved == (79 * 1024,)
    three = sides.filled(Point(TINY["8b"], 256, 3, shared=True), 2, torch.float32)
    union = sides.QuestStep(three, 64, "per_query").sides(Rotation(2))[1].moved[2]
    assert 64 * 256 < union <= 256 * 256 + 2 * 16 * 256


def test_a_visit_counts_what_it_says_and_buffers_take_turns() -> None:
    turns: dict[str, list[int]] = {"one": [], "two": []}
    rotation = Rotation(3)
    one = Side("one", {"a": turns["one"].append, "b": lambda _: None}, (8, 0), rotation)
    two = Side("two", {"c": turns["two"].append}, (4,), rotation, uncounted=0, counted=1)
    times = timing.measure([one, two], 0.0)
    cycles = timing.FEWEST_CYCLES + 1
    assert len(turns["one"]) == 4 * cycles
    assert len(turns["two"]) == cycles
    order = [turns["one"][:4], turns["two"][:1], turns["one"][4:8]]
    assert list(itertools.chain(*order)) == [0, 1, 2, 0, 1, 2, 0, 1, 2]
    assert [len(visit) for visit in times.us("one")] == [3] * timing.FEWEST_CYCLES
    whole, parts = times.us("one"), (times.us("one", "a"), times.us("one", "b"))
    assert whole[1][2] == pytest.approx(parts[0][1][2] + parts[1][1][2])
    assert times.rate("one")[0][0] == pytest.approx(8 / whole[0][0])
    assert times.rate("one", "b")[0][0] == 0


def test_times_hold_no_memory() -> None:
    buffer = torch.zeros(4)
    held = weakref.ref(buffer)
    times = timing.measure([Side("x", {"x": lambda _, b=buffer: b.sum()}, (16,))], 0.0)  # type: ignore[misc]
    del buffer
    gc.collect()
    assert held() is None
    assert times.us("x")


def test_statistics() -> None:
    assert timing.spread([[1, 2, 3], [4, 5], [6, 7, 8, 9, 10, 11]]) == (6, 2, 10, 11)
    assert timing.spread([[7.0]]) == (7, 7, 7, 1)
    # The second cycle was slow for both sides: a paired ratio does not see it.
    assert timing.paired([[2, 2, 50], [20, 20, 21], [2]], [[1], [10], [1]]) == 2
    with pytest.raises(ValueError, match="shorter"):
        timing.paired([[1], [2]], [[1]])


def test_a_buffer_returns_only_after_other_memory() -> None:
    assert timing.buffers_needed([(100, True)], 100) == 2
    assert timing.buffers_needed([(100, True)], 101) == 3
    assert timing.buffers_needed([(10, True)] * 4 + [(1000, False)], 100) == 4
    # Three small calls in a row and then a large one: the smallest window decides.
    assert timing.buffers_needed([(100, True), (1, True), (1, True), (1, True)], 100) == 5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--shape", "9b"], "--shape=9b is unknown; choose one of 7b, 8b, 1b"),
        (["--context", "8K", "x"], "--context=x: expected positive numbers such as 8192 or 8K"),
        (["--context", "1000"], "--context=1000: expected a multiple of 16 above it"),
        (["--budget", "8"], "--budget=8: expected a multiple of 16 above it"),
        (["--rows", "-1"], "--rows=-1: expected positive numbers"),
        (["--device", "tpu"], "--device=tpu is unknown; choose one of cpu, cuda"),
        (["--threads", "0"], "--threads=0: expected positive numbers"),
        (["--dtype", "float16"], "--dtype=float16 is unknown; choose one of bfloat16, float32"),
        (["--lists", "min"], "--lists=min is unknown; choose one of per_query, max, mean"),
        (["--seconds", "0"], "--seconds=0.0: expected a positive number"),
        (["--seconds", "nan"], "--seconds=nan: expected a positive number"),
        (["--memory", "1", "--shape", "7b"], "--memory=1: 7b at 8192 tokens needs 1."),
        (["--quick", "--shape", "1b"], "none of the summary's points"),
    ],
)
def test_wrong_options_are_one_line(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["attention", *options]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert said in lines[0]


CPU = Place(torch.device("cpu"), 32 << 20, "the test")
H100 = Place(torch.device("cuda", 0), 50 << 20, "the test")


def test_the_default_grid_fits_and_holds_the_figures() -> None:
    plan = planned(_options([]), CPU)
    everything = (*plan.points, *plan.sharing)
    assert max(plan.memory(point) for point in everything) < 10e9
    quick = planned(_options(["--quick"]), CPU)
    assert [str(point) for point in (*quick.points, *quick.sharing)] == [
        "7b at 32768 tokens",
        "8b at 32768 tokens",
        "7b at 8192 tokens, 26 rows, shared prefix",
        "8b at 8192 tokens, 26 rows, shared prefix",
    ]
    assert {str(point) for point in everything} > {str(point) for point in quick.points}
    assert sum(point.rows == 8 for point in plan.points) == 4


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    attention.add_arguments(parser)
    return parser.parse_args(arguments)


def test_the_last_level_cache_is_read_or_said_to_be_assumed() -> None:
    size, source = last_level_cache()
    assert size > 0
    assert source.startswith(("/sys", "assumed"))
    assert [parsed_size(text) for text in ("48K", "32768k", "1G", "7", "K", "1.5M")] == [
        *(48 << 10, 32 << 20, 1 << 30, 7, 0, 0)
    ]


def test_a_gpu_is_chosen_only_where_it_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert chosen_place(None) == chosen_place("cpu")
    with pytest.raises(ValueError, match="--device=cuda: torch finds no CUDA device"):
        chosen_place("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert chosen_place(None).device.type == "cpu"
    with pytest.raises(ValueError, match=r"--device=cuda: quest_dist\._cuda is not built: run"):
        chosen_place("cuda")


def test_the_default_grid_of_a_gpu_fits_and_outgrows_its_cache() -> None:
    plan = planned(_options([]), H100)
    assert plan.record is not None
    assert max(plan.memory(point) for point in (*plan.points, *plan.sharing)) < 12e9
    for point in plan.points:
        least = point.score_bytes(plan.dtype)
        assert (plan.layers(point) - 1) * least >= 4 * H100.cache
        if not point.shared:
            assert (plan.copies(point) - 1) * point.dense_bytes(plan.dtype) >= 4 * H100.cache
    quick = planned(_options(["--quick", "--dtype", "float16"]), H100)
    assert [str(point) for point in (*quick.points, *quick.sharing)] == [
        "7b at 32768 tokens",
        "8b at 32768 tokens",
        "8b at 131072 tokens",
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
