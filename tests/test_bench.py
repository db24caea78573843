"""The benchmarks' clock, buffers and options, and a run of the attention benchmark in miniature."""

from __future__ import annotations

import gc
import itertools
import json
import math
import weakref
from pathlib import Path

import pytest
import torch
from bench_points import CPU, TINY, options, tiny

from quest_dist import attention_sides as sides
from quest_dist import ops, timing
from quest_dist.bench import attention
from quest_dist.bench.__main__ import main
from quest_dist.bench.attention_figures import Figures
from quest_dist.bench.attention_plan import planned
from quest_dist.places import last_level_cache
from quest_dist.shapes import SHAPES, Point, parsed_size
from quest_dist.timing import Rotation, Side


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_tiny_run_has_every_figure(dtype: torch.dtype, tmp_path: Path) -> None:
    report = attention.measured(tiny(dtype))
    report.show()
    report.write(tmp_path / "new" / "report.json")
    content = json.loads((tmp_path / "new" / "report.json").read_text())
    assert content["targets"] == Figures.targets
    assert list(content["summary"])[: len(Figures.targets)] == list(Figures.targets)
    assert all(math.isfinite(value) and value > 0 for value in content["summary"].values())
    orders = {row["pages"] for row in content["rows"]}
    assert orders == {"as handed out", "shuffled"}
    seen = {(row["shape"], row["rows"], row["prefix"], row["what"]) for row in content["rows"]}
    for what in ("read", "dense", "quest", "score", "select", "attend", "sdpa gqa", "sdpa folded"):
        assert ("8b", 1, None, what) in seen
    assert ("7b", 1, None, "sdpa folded") not in seen  # a group of one query is not folded
    assert ("8b", 3, "separate", "sdpa gqa") in seen
    assert ("8b", 3, "shared", "sdpa gqa") not in seen  # it has no shared rows
    assert ("7b", 5, "shared", "dense, 5 calls") in seen
    for row in content["rows"]:
        assert 0 < row["p5"] <= row["p10"] <= row["us"] <= row["p90"] <= row["p95"]
    assert content["setting"]["flashinfer"].endswith("runs on CUDA devices only, not on the cpu")
    assert "x flashinfer" not in content["rows"][0]
    whole = next(row for row in content["rows"] if row["what"] == "pieces")
    parts = [row for row in content["rows"] if row["what"] in ("score", "select", "attend")][:3]
    assert sum(part["p5"] for part in parts) <= whole["p95"]


def test_results_that_could_not_be_written_are_not_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    place = tmp_path / "file" / "below.json"
    assert main(["attention", "--json", str(place), "--seconds", "1000"]) == 2
    assert capsys.readouterr().err.startswith(f"error: --json {place}: cannot be written")
    assert main(["attention", "--json", str(tmp_path / "new.json"), "--seconds", "-1"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_shared_rows_and_single_calls_compute_the_same() -> None:
    cache = sides.filled(Point(TINY["8b"], 128, 5, shared=True), 5, torch.float32)
    together = ops.attend(cache.q[0], cache.kv[0], cache.table, cache.lengths).out
    for row in range(5):
        alone = ops.attend(
            cache.q[0, row, None], cache.kv[row], cache.table[row, None], cache.lengths[:1]
        )
        assert torch.equal(alone.out[0], together[row])
    assert len(set(cache.table[:, -1].tolist())) == 5
    assert cache.table[0].tolist() == [*range(7), 7]
    shuffled = sides.filled(Point(TINY["8b"], 128, shuffled=True), 1, torch.float32)
    assert shuffled.table[0].tolist() != list(range(8)) == sorted(shuffled.table[0].tolist())
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
    times = timing.measure([one, two], 0.0, warm_up=3)
    cycles = timing.FEWEST_CYCLES
    assert len(turns["one"]) == 3 + 4 * cycles
    assert len(turns["two"]) == 3 + cycles
    order = [turns["one"][:3], turns["two"][:3], turns["one"][3:7], turns["two"][3:4]]
    assert list(itertools.chain(*order)) == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1]
    assert set(times.first) == {"one", "two"}
    assert len(timing.measure([one], 9.0, cycles=2).us("one")) == 2
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
    few = timing.spread([[1, 2, 3], [4, 5], [6, 7, 8, 9, 10, 11]])
    assert few[:5] == (6, 1.5, 2, 10, 10.5)
    assert math.isnan(few.low)
    assert few[7:] == (11, 3)
    # Medians of the repeats are 5, 1, 2, 3, 4, 9; six have the whole range as their interval.
    six = timing.spread([[5, 5, 90], [1], [2, 2], [3], [4], [9, 8, 10]])
    assert six[:2] == (5, 1.5)
    assert six[4:7] == (pytest.approx(50.0), 1, 9)
    assert timing.spread([[7.0]])[:3] == (7, 7, 7)
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


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--part", "cash"], "--part=cash is unknown; choose one of cache"),
        (["--shape", "9b"], "--shape=9b is unknown; choose one of 7b, 8b, 1b"),
        (["--context", "1000"], "--context=1000: expected a multiple of 128 above it"),
        (["--seconds", "0"], "--seconds=0.0: expected a positive number"),
    ],
)
def test_wrong_options_of_packed_are_one_line(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["packed", *options]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"error: {said}")


def test_the_default_grid_fits_and_holds_the_figures() -> None:
    plan = planned(options([]), CPU)
    everything = (*plan.points, *plan.sharing)
    assert max(plan.memory(point) for point in everything) < 10e9
    quick = planned(options(["--quick"]), CPU)
    assert [str(point) for point in (*quick.points, *quick.sharing)] == [
        "7b at 32768 tokens",
        "8b at 32768 tokens",
        "7b at 32768 tokens, shuffled",
        "8b at 32768 tokens, shuffled",
        "7b at 8192 tokens, 26 rows, shared prefix",
        "8b at 8192 tokens, 26 rows, shared prefix",
    ]
    assert {str(point) for point in everything} > {str(point) for point in quick.points}
    assert sum(point.rows == 8 for point in plan.points) == 4


def test_the_last_level_cache_is_read_or_said_to_be_assumed() -> None:
    size, source = last_level_cache()
    assert size > 0
    assert source.startswith(("/sys", "assumed"))
    assert [parsed_size(text) for text in ("48K", "32768k", "1G", "7", "K", "1.5M")] == [
        *(48 << 10, 32 << 20, 1 << 30, 7, 0, 0)
    ]
