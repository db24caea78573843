"""The benchmark of weights in 4 bits: its sides, its figures, and what it refuses to time."""

from __future__ import annotations

import argparse

import pytest
import torch

from quest_dist import int4
from quest_dist.bench import packed_weights
from quest_dist.bench.packed_part import COLUMNS
from quest_dist.decoders import MODELS
from quest_dist.int4 import Int4
from quest_dist.places import Place
from quest_dist.timing import Times


def test_a_tiny_layer_is_timed_beside_bf16() -> None:
    options = argparse.Namespace(shape="tiny", seconds=0.01)
    place = Place(torch.device("cpu"), 1 << 16, "here")
    with torch.inference_mode():
        part = packed_weights.measured(options, place)
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in part.rows]
    layer = {row["side"]: row for row in rows if row["what"] == "weights, tiny, a layer"}
    assert list(layer) == ["read", "bf16, 1 row", "w4, 1 row", "bf16, 8 rows", "w4, 8 rows"]
    assert layer["bf16, 1 row"]["x baseline"] == 1
    assert layer["w4, 1 row"]["MB"] / layer["bf16, 1 row"]["MB"] == pytest.approx(0.278, abs=0.001)
    assert part.setting["layers"] > 2
    assert set(part.summary) == {"w4_vs_bf16", "w4_vs_bf16_at_read_speed"}
    assert part.summary["w4_vs_bf16"] == layer["w4, 1 row"]["x baseline"]
    each = [row for row in rows if "_proj" in row["what"]]
    assert len(each) == 2 * 7
    assert each[-2]["what"] == "weights, tiny, down_proj 64 x 128"


def test_sizes_are_the_models() -> None:
    total = sum(outputs * inputs for outputs, inputs in packed_weights.sizes(MODELS["8b"]).values())
    assert 32 * total == MODELS["8b"].projected == 6_979_321_856


def test_figures_are_of_one_row_and_a_whole_layer() -> None:
    moved = {"read": {"read": 1000}, "bf16, 1 row": {"a": 400, "b": 400}, "w4, 1 row": {"a": 200}}
    visits = {"read": [[(10.0,)]], "bf16, 1 row": [[(10.0, 6.0)]], "w4, 1 row": [[(4.0,)]]}
    found = packed_weights.summary(Times(visits, moved))
    assert found == {"w4_vs_bf16": 0.25, "w4_vs_bf16_at_read_speed": 0.5}


def test_wrong_products_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = int4.pack(int4.quantise(torch.randn(32, 64)))
    x = {(rows, 64): torch.randn(rows, 64).bfloat16() for rows in packed_weights.ROWS}
    packed_weights.check({"q_proj": weight}, x)
    other = Int4(weight.data.flip(0), 32, 64, 128)
    right = int4.widened(weight, torch.bfloat16)
    monkeypatch.setattr(int4, "widened", lambda *_: right)
    with pytest.raises(RuntimeError, match="q_proj of 1 rows: 4-bit weights are off by"):
        packed_weights.check({"q_proj": other}, x)
