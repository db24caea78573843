"""Bytes that methods move and hold, against the formulas of their papers."""

from __future__ import annotations

import pytest
from cache_harness import Stream, decode, method_spec

from quest_dist.methods.traffic import CacheShape

SHAPE = CacheShape(kv_heads=2, head_dim=16, element_bytes=4, page_size=4)
TOKEN, VECTOR, SCORE = 2 * 2 * 16 * 4, 2 * 16 * 4, 2 * 4  # bytes: of both heads; a score a head
PACKED = 2 * 2 * (16 * 4 / 8 + 2 * 4)
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
        # Blocks of 16 tokens: codes (of 3 bits in two planes, the second half empty for heads of 16
        # channels), offset and range a value, five starts; two outlier values and 0.32 keys a token
        # of 32 channels; a sink; and the norms of 32 channels with two tables of eight.
        *(
            ("kvquant3", settings, *[sinks * TOKEN + 5 * 596 + (75 - sinks) * outliers + 320] * 2)
            for settings, sinks, outliers in (
                ({}, 1, 4 * 2.32),
                ({"outliers": 0.0, "sinks": 0}, 0, 0),
            )
        ),
        ("kvquant2", {"outliers": 0.0, "sinks": 0}, *[5 * 340 + 288] * 2),
        # Of 74 tokens of prefix 6 are the window: 68 in 3 clusters, with a label a kv head each.
        ("squeezed", {}, 12 * TOKEN + 3 * VECTOR, LENGTH * TOKEN + 3 * VECTOR + 68 * 2 * 4),
        (
            "squeezed",
            {"clusters": 0.5, "coarse_clusters": 0.1},  # 34 and 6; 5 of 68 tokens are to be kept
            12 * TOKEN + (6 + 34 * 73 / 136) * VECTOR,
            LENGTH * TOKEN + 40 * VECTOR + 68 * 2 * 4,
        ),
        # A state of 2 heads x 8 x (16 + 1) fp32 numbers.
        ("less_h2o", {}, 12 * (TOKEN + 2 * SCORE) + 1088, 12 * (TOKEN + SCORE) + 1088),
        ("less_window", {"rank": 4}, 12 * TOKEN + 544, 12 * TOKEN + 544),
        ("tova", {}, 12 * (TOKEN + 2 * 4), 12 * (TOKEN + 4)),
        ("snapkv", {}, 12 * TOKEN, 12 * TOKEN),
        # Four bits, a scale and a min a vector; its sum of attention and how well it rounds.
        ("qhitter", {}, 12 * (PACKED + 3 * SCORE), 12 * (PACKED + 2 * SCORE)),
        ("qhitter", {"attention_weight": 1}, 12 * (PACKED + 2 * SCORE), 12 * (PACKED + SCORE)),
        ("dejavu", {}, LENGTH * TOKEN, LENGTH * TOKEN),
        ("dejavu", {"heads": "predicted"}, 12 * TOKEN, LENGTH * TOKEN),
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
