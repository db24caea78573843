"""Bytes that methods move and hold, against the formulas of their papers."""

from __future__ import annotations

import pytest
from cache_harness import Stream, decode, method_spec

from quest_dist.methods.traffic import CacheShape

SHAPE = CacheShape(kv_heads=2, head_dim=16, element_bytes=4, page_size=4)
TOKEN, VECTOR, SCORE = 2 * 2 * 16 * 4, 2 * 16 * 4, 2 * 4  # bytes: of both heads; a score a head
LENGTH, BUDGET = 75, 12


@pytest.mark.parametrize(
    ("name", "settings", "moved", "held"),
    [
        ("full", {}, LENGTH * TOKEN, LENGTH * TOKEN),
        ("quest", {"gqa": "max"}, 12 * TOKEN + 18 * TOKEN, LENGTH * TOKEN + 18 * TOKEN),
        (
            "quest",
            {"gqa": "max", "metadata": "int8"},
            12 * TOKEN + 18 * TOKEN / 4,
            LENGTH * TOKEN + 18 * TOKEN / 4,
        ),
        ("oracle_token", {"gqa": "max"}, (LENGTH + 12) * VECTOR, LENGTH * TOKEN),
        ("oracle_page", {"gqa": "max"}, (LENGTH + 12) * VECTOR, LENGTH * TOKEN),
        ("streaming", {}, 12 * TOKEN, 12 * TOKEN),
        ("h2o", {}, 12 * (TOKEN + 2 * SCORE), 12 * (TOKEN + SCORE)),
        # 32 channels: 3 bits of key and value, two outlier values and 0.32 keys, offset and range,
        # a count; a sink; and the bounds of 32 channels with two tables of eight.
        ("kvquant3", {}, TOKEN + 74 * 39.28 + 320, TOKEN + 74 * 39.28 + 320),
        ("kvquant3", {"outliers": 0.0, "sinks": 0}, 75 * 30 + 320, 75 * 30 + 320),
        ("kvquant2", {"outliers": 0.0, "sinks": 0}, 75 * 22 + 288, 75 * 22 + 288),
        ("tova", {}, 12 * (TOKEN + 2 * 4), 12 * (TOKEN + 4)),
    ],
)
def test_a_layer_moves_and_holds_what_its_formula_says(
    name: str, settings: dict[str, object], moved: float, held: float
) -> None:
    method = method_spec(name, **settings).build()
    read = LENGTH if name == "full" else BUDGET
    assert method.bytes_moved(SHAPE, LENGTH, BUDGET, read) == pytest.approx(moved, rel=1e-12)
    assert method.bytes_held(SHAPE, LENGTH, BUDGET) == pytest.approx(held, rel=1e-12)


@pytest.mark.parametrize("dense_layers", [0, 2])
def test_a_batch_adds_the_layers_up_dense_ones_included(dense_layers: int) -> None:
    stream = Stream.random(40, layers=3)
    build = method_spec("streaming").build
    run = decode(stream, build, [8], prefix=36, page_size=4, dense_layers=dense_layers)
    [measured] = run.batch.measured
    assert measured.steps == 4
    dense = sum(range(37, 41)) * TOKEN
    assert measured.bytes_moved == dense_layers * dense + (3 - dense_layers) * 4 * 8 * TOKEN
    assert measured.bytes_held == measured.bytes_moved
