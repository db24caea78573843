"""The text generation benchmark: sizes, options and figures, and a run in miniature."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quest_dist import decoders, models
from quest_dist.attention import patch
from quest_dist.batch import Group
from quest_dist.bench import textgen
from quest_dist.bench.__main__ import main
from quest_dist.bench.textgen import Outcome, Plan
from quest_dist.decoders import MODELS, filled, pages_needed
from quest_dist.latency import Decoder
from quest_dist.methods.full import Full
from quest_dist.methods.quest import Quest
from quest_dist.places import Place
from quest_dist.timing import Times

CPU = Place(torch.device("cpu"), 1 << 20, "here")


def plan(*arguments: str) -> Plan:
    """What a command line asks for, on a CPU."""
    parser = argparse.ArgumentParser()
    textgen.add_arguments(parser)
    return textgen.planned(parser.parse_args(list(arguments)), CPU)


def test_a_tiny_run_measures_both_sides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "textgen.json"
    few = ["--shape", "tiny", "--context", "256", "512", "--budget", "64", "--steps", "4"]
    assert (
        main(["textgen", *few, "--device", "cpu", "--dtype", "float32", "--json", str(path)]) == 0
    )
    assert "quest_vs_dense_7b: - (target >= 1.7)" in capsys.readouterr().out
    content = json.loads(path.read_text())
    assert content["targets"] == {"quest_vs_dense_7b": ">= 1.7"}
    assert content["setting"]["device"] == "cpu"
    assert [(row["what"], row["context"], row["budget"]) for row in content["rows"]] == [
        *(("dense", 256, "all"), ("quest", 256, 64), ("dense", 512, "all"), ("quest", 512, 64))
    ]
    for row in content["rows"]:
        assert row["calls"] == 4 * 6
        assert 0 < row["p5"] <= row["ms"] <= row["p95"]
        assert 0 < row["low"] <= row["high"]
        assert row["first"] > 0
        assert row["tokens/s"] == pytest.approx(1000 / row["ms"])
    dense, quest = content["rows"][2:]
    assert quest["x dense"] > 0
    assert quest["GB/s"] * quest["ms"] < dense["GB/s"] * dense["ms"]


def test_sizes_are_those_of_the_real_models() -> None:
    known = {"7b": 6_738_415_616, "8b": 8_030_261_248, "1b": 1_235_814_400}
    assert {name: MODELS[name].parameters for name in known} == known
    tiny = MODELS["tiny"]
    made = models.random(tiny.sizes(64), torch.float32, torch.device("cpu"))
    assert sum(parameter.numel() for parameter in made.parameters()) == tiny.parameters
    tied = replace(tiny, tied=True)
    made = models.random(tied.sizes(64), torch.float32, torch.device("cpu"))
    assert sum(parameter.numel() for parameter in made.parameters()) == tied.parameters
    assert made.config.max_position_embeddings == 64


def test_bytes_are_those_that_must_be_read() -> None:
    seven, dtype = MODELS["7b"], torch.bfloat16
    weights, layer = 2 * (seven.parameters - 32000 * 4096), 32768 * 16384
    assert seven.dense_bytes(32768, dtype) == weights + 32 * layer
    quest = 2 * layer + 30 * (2048 * 16384 + 2047 * 16384)
    assert seven.quest_bytes(32768, 2048, 2, dtype) == weights + quest
    assert seven.quest_bytes(32768, 2048, 32, dtype) == seven.dense_bytes(32768, dtype)


def test_both_sides_go_on_from_the_same_pages_in_the_memory_that_was_counted() -> None:
    tiny = MODELS["tiny"]
    made = models.random(tiny.sizes(100), torch.float32, torch.device("cpu"))
    groups = {"dense": Group(Full(), [0], 1), "quest": Group(Quest(gqa="max"), [32], 1)}
    with torch.inference_mode(), patch(made, lambda rows: [], 16) as patched:
        prefix = filled(patched.geometry, 100, torch.device("cpu"), pages_needed(100, 2, 30))
        pool = prefix.pool
        keys, _ = prefix.gather(2, 0)
        assert keys.shape == (1, 2, 100, 16)
        assert keys.std() == pytest.approx(1.0, abs=0.1)
        assert not torch.equal(keys, prefix.gather(1, 0)[0])
        sides = decoders.continued(patched, prefix, groups, 30)
        assert pool.kv.nbytes + pool.meta.nbytes == tiny.cache_bytes(100, torch.float32, 2, 30)
        assert all(decoder.pool.kv is pool.kv for decoder in sides.values())
        for decoder in sides.values():
            for _ in range(30):
                decoder.step()
            assert decoder.lengths.tolist() == [130]
        assert torch.equal(prefix.gather(2, 0)[0], keys)


def test_a_step_that_attends_to_something_else_is_not_timed() -> None:
    made = models.random(MODELS["tiny"].sizes(100), torch.float32, torch.device("cpu"))
    with torch.inference_mode(), patch(made, lambda rows: [], 16) as patched:
        prefix = filled(patched.geometry, 100, torch.device("cpu"), 10)
        decoder = Decoder(patched, prefix.fork(0, 1), Group(Quest(), [32], 1), 2)
        decoder.step()
        with pytest.raises(RuntimeError, match="layer 1 attended to 21 to 21 tokens, 37 to 37"):
            decoders.check_step(decoder, Group(Quest(), [48], 1), 101)
        decoder.logits[0, 3] = math.nan
        with pytest.raises(RuntimeError, match="not finite"):
            decoders.check_step(decoder, Group(Quest(), [32], 1), 101)


def test_figures_are_of_their_own_point_only() -> None:
    moved = {name: {"step": 1000} for name in ("full", "quest")}
    ran = Times({"full": [[(4000.0,)], [(6000.0,)]], "quest": [[(2000.0,)], [(2000.0,)]]}, moved)
    seven = Outcome(MODELS["7b"], 32768, ran)
    found = textgen.summary(plan(), [seven, Outcome(MODELS["8b"], 16384, ran)])
    assert found == {
        "quest_vs_dense_7b": 2.5,
        "quest_vs_dense_8b": None,
        "quest_vs_dense_1b": None,
        "dense_ms_7b": 5.0,
        "quest_ms_7b": 2.0,
    }
    for other in (plan("--budget", "1K"), plan("--dtype", "float32")):
        assert set(textgen.summary(other, [seven]).values()) == {None}


def test_a_model_too_large_for_the_memory_is_refused_with_its_sizes() -> None:
    wanted = plan("--shape", "7b", "tiny")
    textgen.check_memory(wanted, 40 * 10**9)
    with pytest.raises(ValueError, match="--shape: 7b at 32768 tokens needs") as refused:
        textgen.check_memory(wanted, 24 * 10**9)
    for said in ("13.5 GB of weights", "18.3 GB of cache", "the cpu has 24.0 GB free", "or tiny"):
        assert said in str(refused.value)
    assert "tiny at" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--shape", "9b"], "--shape=9b is unknown; choose one of 7b, 8b, 1b, tiny"),
        (["--context", "x"], "--context=x: expected positive numbers such as 8192 or 8K"),
        (["--context", "1000"], "--context=1000: expected a multiple of 16"),
        (["--budget", "32K"], "--budget=32768: expected less than --context=32768"),
        (["--budget", "100"], "--budget=100: expected a multiple of 16"),
        (["--shape", "tiny", "--dense-layers", "4"], "--dense-layers=4: expected 0..3"),
        (["--dtype", "float16"], "--dtype=float16 is unknown; choose one of bfloat16, float32"),
        (["--device", "gpu"], "--device=gpu is unknown; choose one of cpu, cuda"),
        (["--lists", "min"], "--lists=min is unknown"),
        (["--steps", "6"], "--steps=6: expected a positive multiple of 4"),
        (["--repeats", "4"], "--repeats=4: expected at least 5"),
    ],
)
def test_wrong_options_are_one_line(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place = [] if "--device" in options else ["--device", "cpu"]
    assert main(["textgen", *place, *options]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert said in lines[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_tiny_run_on_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "textgen.json"
    few = ["--shape", "tiny", "--context", "512", "--budget", "64", "--steps", "4"]
    assert main(["textgen", *few, "--device", "cuda", "--json", str(path)]) == 0
    content = json.loads(path.read_text())
    assert content["setting"]["timing"].startswith("replays of a CUDA graph")
    assert all(row["ms"] > 0 for row in content["rows"])
