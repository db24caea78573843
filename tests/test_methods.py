"""Every method of conf/method against the universal catalogue: identity, selection, budget,
determinism."""

from __future__ import annotations

import pytest
import torch
from cache_harness import (
    BUDGETED,
    VARIANTS,
    Run,
    Stream,
    decode,
    method_spec,
    tokens_of,
)
from cache_harness import METHODS as NAMES

from quest_dist.methods.method import Method

METHODS = [*NAMES, *VARIANTS]
S = 4


def run(name: str, budgets: list[int], tokens: int, prefix: int, **options: object) -> Run:
    """Decode a random stream under a method."""
    settings = options.pop("settings", {})
    stream = options.pop("stream", None) or Stream.random(tokens)
    return decode(
        stream, method_spec(name, **settings).build, budgets, prefix=prefix, page_size=S, **options
    )


@pytest.mark.parametrize("length", [2, S - 1, S, S + 1, 3 * S - 1, 100, 257])
@pytest.mark.parametrize("name", [name for name in BUDGETED if method_spec(name).build().exact])
def test_a_budget_that_covers_the_length_is_dense_bit_for_bit(name: str, length: int) -> None:
    budgets = [max(length, 5), length + 5, 10 * length + 5]
    dense = run("full", [0], length, length - 1)
    sparse = run(name, budgets, length, length - 1)
    for row in range(len(budgets)):
        assert torch.equal(sparse.outputs[:, row], dense.outputs[:, 0])


@pytest.mark.parametrize("name", BUDGETED)
def test_decoding_from_an_empty_cache_is_dense_until_the_budget(name: str) -> None:
    stream = Stream.random(40)
    dense = decode(stream, method_spec("full").build, [0], prefix=1, page_size=S)
    sparse = decode(stream, method_spec(name).build, [16], prefix=1, page_size=S)
    assert torch.equal(sparse.outputs[:15, 0], dense.outputs[:15, 0])
    assert not torch.equal(sparse.outputs[20:, 0], dense.outputs[20:, 0])


@pytest.mark.parametrize("name", METHODS)
def test_selected_tokens_exist_once_and_number_what_was_planned(name: str) -> None:
    budgets = [8, 12, 30] if name in BUDGETED else [0, 0, 0]
    result = run(name, budgets, 75, 61)
    method = method_spec(name).build()
    for number, step in enumerate(result.steps):
        for row, budget in enumerate(budgets):
            length = step.view.lengths_list[row]
            low, high = method.planned(length, budget, S, number)
            for head in range(step.view.heads):
                tokens = tokens_of(step, row, head)
                assert len(set(tokens)) == len(tokens)
                assert all(0 <= token < length for token in tokens)
                assert low <= len(tokens) <= high
                assert int(step.attended.attended[row, head]) == len(tokens)


@pytest.mark.parametrize("name", BUDGETED)
def test_the_new_token_is_attended_and_density_is_as_planned(name: str) -> None:
    result = run(name, [8, 30], 75, 61)
    for step in result.steps:
        for row, head in [(0, 0), (1, 3)]:
            assert step.view.lengths_list[row] - 1 in tokens_of(step, row, head)
    for measured in result.batch.measured:
        assert measured.steps == 14
        assert measured.planned_low - 1e-6 <= measured.attended <= measured.planned_high + 1e-6
        assert measured.attended - 1e-6 <= measured.read <= 2 * measured.attended + 1e-6


@pytest.mark.parametrize("name", METHODS)
def test_output_is_a_convex_combination_of_selected_values(name: str) -> None:
    stream = Stream.random(50)
    # A quantiser need not have two values of a token exact, but one.
    value = torch.tensor([1.5, -2.0 if method_spec(name).build().exact else 1.5] * 8)
    stream.v[:] = value
    result = run(name, [8, 20], 50, 45, stream=stream)
    assert torch.allclose(result.outputs, value.expand_as(result.outputs))
    for step in result.steps:
        sums = step.attended.probabilities.sum(-1)
        assert torch.allclose(sums, torch.ones_like(sums), atol=1e-6)
        assert bool((step.attended.probabilities >= 0).all())


@pytest.mark.parametrize("name", [name for name in BUDGETED if name not in ("oracle_token",)])
def test_no_method_captures_more_mass_than_the_token_oracle(name: str) -> None:
    stream = Stream.random(60)
    for budget in (8, 16, 32):
        oracle = decode(stream, method_spec("oracle_token").build, [budget], prefix=59, page_size=S)
        other = decode(stream, method_spec(name).build, [budget], prefix=59, page_size=S)
        if name == "h2o":
            continue  # its first step is dense by definition
        assert bool((oracle.steps[0].attended.lse >= other.steps[0].attended.lse - 1e-5).all())


@pytest.mark.parametrize("budget", [8, 16, 32])
@pytest.mark.parametrize("name", ["quest", "tightbound"])
def test_the_page_oracle_captures_at_least_the_mass_of_quest(name: str, budget: int) -> None:
    stream = Stream.random(61)
    oracle = decode(stream, method_spec("oracle_page").build, [budget], prefix=60, page_size=S)
    other = decode(stream, method_spec(name).build, [budget], prefix=60, page_size=S)
    assert bool((oracle.steps[0].attended.lse >= other.steps[0].attended.lse - 1e-5).all())


def _choices(name: str) -> list[Method]:
    return [method_spec(name, gqa=gqa).build() for gqa in ("per_query", "max", "mean")]


@pytest.mark.parametrize(
    "name", ["quest", "quest with int8", "tightbound", "oracle_token", "oracle_page"]
)
def test_gqa_choices_coincide_with_one_query_head_a_kv_head(name: str) -> None:
    stream = Stream.random(50, heads=2, kv_heads=2)
    results = [
        decode(stream, lambda method=method: method, [12], prefix=40, page_size=S)
        for method in _choices(name)
    ]
    assert torch.equal(results[0].outputs, results[1].outputs)
    assert torch.equal(results[0].outputs, results[2].outputs)


@pytest.mark.parametrize(
    "name",
    ["full", "quest", "quest with int8", "tightbound", "streaming", "oracle_token", "oracle_page"],
)
def test_per_query_equals_multi_head_attention_on_repeated_keys(name: str) -> None:
    grouped = Stream.random(50, heads=4, kv_heads=2)
    repeated = Stream(
        grouped.q, grouped.k.repeat_interleave(2, 1), grouped.v.repeat_interleave(2, 1)
    )
    budgets = [12, 20]
    few = decode(grouped, method_spec(name).build, budgets, prefix=40, page_size=S)
    many = decode(repeated, method_spec(name).build, budgets, prefix=40, page_size=S)
    assert torch.equal(few.outputs, many.outputs)


@pytest.mark.parametrize("name", METHODS)
def test_rows_do_not_depend_on_their_neighbours(name: str) -> None:
    budgets = [8, 12, 30]
    together = run(name, budgets, 60, 50)
    for row, budget in enumerate(budgets):
        alone = run(name, [budget], 60, 50)
        assert torch.equal(together.outputs[:, row], alone.outputs[:, 0])
    backwards = run(name, budgets[::-1], 60, 50)
    assert torch.equal(together.outputs, backwards.outputs.flip(1))


@pytest.mark.parametrize("name", METHODS)
def test_rows_that_stay_do_not_notice_rows_that_leave(name: str) -> None:
    stream = Stream.random(60)
    whole = decode(stream, method_spec(name).build, [8, 12, 30], prefix=50, page_size=S)
    part = decode(
        Stream(stream.q[:, :, :55], stream.k[:, :, :55], stream.v[:, :, :55]),
        method_spec(name).build,
        [8, 12, 30],
        prefix=50,
        page_size=S,
    )
    part.batch.keep([0, 2])
    from cache_harness import _forward

    for position in range(55, 60):
        out = _forward(part.batch, stream, position, 1, 0.25, 2)
        assert torch.equal(out, whole.outputs[position - 50][[0, 2]])


@pytest.mark.parametrize("name", METHODS)
def test_chunked_prefill_gives_the_state_of_a_single_one(name: str) -> None:
    whole = run(name, [8, 20], 60, 50)
    parts = run(name, [8, 20], 60, 50, chunks=[S + 1, 30, 50 - 31 - S])
    assert torch.allclose(whole.outputs, parts.outputs, atol=1e-5)
    layers = whole.batch.pool.meta.shape[0]
    for layer in range(layers):
        for row in range(2):
            first, second = (r.batch.rows.gather(layer, row) for r in (whole, parts))
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_two_runs_are_equal_and_samples_do_not_leak(name: str) -> None:
    first = run(name, [8, 20], 60, 50)
    run(name, [8, 20], 60, 50, stream=Stream.random(60, seed=7))
    again = run(name, [8, 20], 60, 50)
    assert torch.equal(first.outputs, again.outputs)


@pytest.mark.parametrize("layers", [2, 5, 28])
@pytest.mark.parametrize("name", BUDGETED)
def test_dense_layers_are_exactly_dense(name: str, layers: int) -> None:
    stream = Stream.random(45, layers=layers, heads=2, kv_heads=1, head_dim=8)
    dense = decode(stream, method_spec("full").build, [0], prefix=40, page_size=S)
    sparse = decode(stream, method_spec(name).build, [8], prefix=40, page_size=S, dense_layers=2)
    for layer in range(layers):
        same = torch.equal(dense.outputs[1:, :, layer], sparse.outputs[1:, :, layer])
        assert same == (layer < 2)
    assert {step.layer for step in sparse.steps} == set(range(2, layers))


@pytest.mark.parametrize("name", METHODS)
def test_bfloat16_runs_within_the_budget(name: str) -> None:
    stream = Stream.random(60, dtype=torch.bfloat16)
    result = run(name, [8, 20], 60, 50, stream=stream)
    assert bool(result.outputs.isfinite().all())
    for measured in result.batch.measured:
        assert measured.planned_low - 1e-6 <= measured.attended <= measured.planned_high + 1e-6


@pytest.mark.parametrize("name", BUDGETED)
def test_impossible_budgets_are_refused(name: str) -> None:
    method = method_spec(name).build()
    with pytest.raises(ValueError, match="budget=0"):
        method.check_budget(0, S)
    method.check_budget(64, S)
