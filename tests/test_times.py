"""Times as sweeps: tiny shapes through the real worker, the contract's facts, what is refused."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from quest_dist import compose, cost, launch, machine_state, stats, table, timing
from quest_dist.ledger import Ledger
from quest_dist.prepare import prepare
from quest_dist.table import Row
from quest_dist.work import Work

SHAPE = (
    "shape:{layers:3,heads:4,kv_heads:2,head_dim:16,hidden:64,vocab:128,parameters:100000,"
    "max_length:64,intermediate:96,rope_theta:10000,tied:false}"
)
MODEL = f"+model.tiny={{source:hub,repo:no/where,label:Tiny,dtype:float32,{SHAPE}}}"
COMMON = (
    *("name=tiny", MODEL, "grid.model=[tiny]", "grid.method=[full,quest]", "tracking=none"),
    *("cluster=inline", "task.kernels_512.cycles=1", "task.textgen_8k.context=256"),
    *("task.textgen_8k.steps=4", "task.textgen_8k.warm_up=2", "task.kernels_512.warm_up=2"),
)


@pytest.fixture(autouse=True)
def _small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with 16 KB of cache, whose buffers are small."""
    monkeypatch.setattr("quest_dist.places.last_level_cache", lambda: (16 << 10, "the test"))


def run(output_dir: Path, *overrides: str) -> tuple[int, dict[tuple[str, str, int | None], Row]]:
    config = compose.composed([*COMMON, f"output_dir={output_dir}", *overrides])
    status = launch.run(config, out=Console(file=io.StringIO(), width=120))
    rows = table.from_csv(output_dir / "tiny" / "points.csv")
    return status, {(row.task, row.method, row.budget): row for row in rows}


def test_kernels_are_timed_by_their_parts_beside_full(tmp_path: Path) -> None:
    status, rows = run(
        tmp_path,
        "grid.task=[kernels_512]",
        "grid.budget=[64,1024]",
        "grid.page_size=[8]",
        "figures=[fig08]",
    )
    assert status == launch.FINISHED
    assert (tmp_path / "tiny" / "fig08.png").stat().st_size > 10_000
    quest, full = rows["kernels_512", "quest", 64], rows["kernels_512", "full", None]
    assert quest.metric == "attention_us"
    assert (quest.n, quest.attended, full.attended) == (9, 64.0, 512.0)
    assert rows["kernels_512", "quest", 1024].attended == 512.0
    assert quest.score == pytest.approx(quest.fact("us"))
    assert 0 < quest.low <= quest.score <= quest.high
    low, high = quest.span("speedup")
    assert 0 < low <= quest.fact("speedup") <= high
    for name in ("score_us", "select_us", "attend_us", "first_us", "p5_us", "p95_us", "read_gbs"):
        assert quest.fact(name) > 0
    assert quest.fact("p5_us") <= quest.fact("us") <= quest.fact("p95_us")
    assert full.fact("speedup") == pytest.approx(1.0)
    assert math.isnan(full.fact("score_us"))
    assert quest.fact("warm_up") == 2
    assert quest.fact("load_before") >= 0
    assert "cold: layers rotate" in quest.notes("cache")[0]
    assert quest.notes("dtype") == ("float32",)
    assert quest.data == "random_keys"


def test_whole_steps_are_timed_without_weights(tmp_path: Path) -> None:
    status, rows = run(
        tmp_path, "grid.task=[textgen_8k]", "grid.budget=[64]", "grid.dense_layers=[1]"
    )
    assert status == launch.FINISHED
    quest, full = rows["textgen_8k", "quest", 64], rows["textgen_8k", "full", None]
    assert quest.metric == "step_ms"
    assert full.attended == 256 + 2 + 4
    assert 48 < quest.attended <= 64
    assert quest.fact("calls") == 4
    assert quest.fact("first_ms") > 0
    assert quest.fact("read_gb") < full.fact("read_gb")
    assert "the context grows from 256 to 262" in quest.notes("tokens")[0]
    assert quest.notes("cuda_graphs") == ("off: a CPU",)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["grid.method=[full,h2o]"], "method h2o: as it is set it is no page rule"),
        (["method.quest.variant=eval_compat"], "method quest: as it is set it is no page rule"),
        (["task.textgen_8k.steps=6"], "task textgen_8k: steps=6 must be a multiple of 4"),
        (["task.textgen_8k.warm_up=0"], "task textgen_8k: warm_up=0 must be at least 1"),
        (["grid.model=[smollm2]", "~model.smollm2.shape.intermediate"],
         "task textgen_8k: model.smollm2.shape.intermediate is not set"),
        (["+model.tiny.shape.qkv_bias=true"], "model.tiny.shape.qkv_bias=true"),
    ],
)  # fmt: skip
def test_what_cannot_be_timed_is_refused_before_a_worker(overrides: list[str], said: str) -> None:
    given = [*COMMON, "grid.task=[textgen_8k]", "grid.budget=[64]", *overrides]
    with pytest.raises(ValueError, match=said):
        prepare(compose.composed(given))


def test_a_context_is_a_whole_number_of_pages(tmp_path: Path) -> None:
    status, rows = run(
        tmp_path, "grid.task=[kernels_512]", "grid.budget=[64]", "grid.page_size=[24]", "limit=1"
    )
    assert status == launch.INCOMPLETE
    error = rows["kernels_512", "quest", 64].error
    assert "context=512 is no multiple of page_size=24" in error


def test_times_run_last_and_say_what_they_cost() -> None:
    given = [*COMMON, "grid.task=[kernels_512,passkey,textgen_8k]", "grid.budget=[64]"]
    work = Work.of(prepare(compose.composed(given)), None)
    order = [unit.first.task.name for unit in work.all_units]
    assert set(order[:-2]) == {"passkey"}
    assert sorted(order[-2:]) == ["kernels_512", "textgen_8k"]
    config = compose.composed(["+sweep=textgen"])
    points = prepare(config).points
    assert 3.5e9 < cost.worker_bytes(points[-4:]) < 6e9  # 2.5 GB of weights and 1 GB of cache
    assert 1 < cost.sample_seconds(points[-4:], 2, False) < 60
    assert cost.sample_seconds(points[-4:], 2, True) < cost.sample_seconds(points[-4:], 2, False)


def test_breakdown_shares_its_points_with_kernels() -> None:
    kernels = {p.key for p in prepare(compose.composed(["+sweep=kernels"])).points}
    assert {p.key for p in prepare(compose.composed(["+sweep=breakdown"])).points} < kernels


def test_the_key_of_a_time_is_the_shape_not_the_weights() -> None:
    given = [*COMMON, "grid.task=[kernels_512]", "grid.budget=[64]"]
    keys = [p.key for p in prepare(compose.composed(given)).points]
    moved = [
        p.key for p in prepare(compose.composed([*given, "model.tiny.repo=else/where"])).points
    ]
    assert moved == keys
    wide = [p.key for p in prepare(compose.composed([*given, "model.tiny.shape.heads=8"])).points]
    assert not set(wide) & set(keys)


def test_a_median_has_an_interval_of_order_statistics_from_six_on() -> None:
    # P(all six on one side) = 2 / 64; of nine, two on either side: 2 * (1 + 9) / 512 = 3.9 %.
    assert stats.median([9, 1, 5, 3, 7, 8]) == stats.Estimate(6.0, 1, 9, 6)
    assert stats.median(range(9)) == stats.Estimate(4.0, 1, 7, 9)  # type: ignore[arg-type]
    few = stats.median([1, 2, 3, 4, 5])
    assert few.value == 3
    assert math.isnan(few.low)
    assert stats.summary([9, 1, 5, 3, 7, 8], "step_ms").value == 6.0
    found = stats.paired([9, 9, 9, 9, 9, 99], [1, 2, 3, 4, 5, 6], "attention_us")
    assert (found.value, found.low, found.high) == (6.5, 4, 93)


def test_repeats_join_as_cycles_and_their_first_calls_stay_apart() -> None:
    moved = {"a": {"step": 8}}
    one = timing.Times({"a": [[(1.0,)], [(3.0,)]]}, moved, {"a": 50.0}, {"a": [2.0]})
    two = timing.Times({"a": [[(5.0,), (7.0,)]]}, moved, {"a": 70.0}, {"a": [4.0]})
    both = timing.joined([one, two])
    assert both.us("a") == [[1.0, 3.0], [5.0, 7.0]]
    assert both.first == {"a": 60.0}
    assert both.hosts() == {"a": 3.0}


def test_a_gpu_needs_twenty_warm_up_calls() -> None:
    assert timing.warm_up(None, "cuda") == 20
    assert timing.warm_up(3, "cpu") == 3
    with pytest.raises(ValueError, match="warm_up=5: a GPU needs at least 20"):
        timing.warm_up(5, "cuda")


def test_the_machines_state_says_what_changed_and_what_cannot_be_read() -> None:
    before = machine_state.State({"load": 0.5, "gpu_throttle": 1.0}, {}, (10, 1000))
    after = machine_state.State({"load": 2.0, "gpu_throttle": 5.0}, {}, (30, 1200))
    facts, texts = machine_state.between(before, after)
    assert (facts["load_before"], facts["load_after"], facts["steal_share"]) == (0.5, 2.0, 0.1)
    assert texts["throttled"] == "nvidia-smi's mask 0x4"
    numbers, lacking = machine_state.parsed_gpu("1980, 2619, [N/A], 34, 0x0000000000000004")
    assert numbers == {
        **{"gpu_sm_mhz": 1980.0, "gpu_memory_mhz": 2619.0, "gpu_celsius": 34.0},
        "gpu_throttle": 4.0,
    }
    assert lacking == "gpu_watts: [N/A]"
    assert machine_state.parsed_gpu("no such GPU") == ({}, "no such GPU")
    here: dict[str, Any] = machine_state.stated(machine_state.read(), machine_state.read())
    assert here["processor"]
    assert json.loads(json.dumps(here)) == here


def test_the_ledger_learns_their_pace(tmp_path: Path) -> None:
    run(tmp_path, "grid.task=[kernels_512]", "grid.budget=[64]", "limit=1")
    with Ledger(tmp_path / "ledger.db") as ledger:
        pace = ledger.pace("tiny", "kernels_512")
    assert pace is not None
    assert min(pace) > 0
