"""Layer budgets: PyramidKV's sequence in whole tokens and pages, and who may not have it."""

from __future__ import annotations

import pytest
from cache_harness import Stream, decode, method_spec, tokens_of

from quest_dist.batch import Group
from quest_dist.compose import composed
from quest_dist.latency import page_rule
from quest_dist.methods.full import Full
from quest_dist.methods.layer_budgets import least, pyramid
from quest_dist.methods.quest import Quest
from quest_dist.methods.snapkv import SnapKV
from quest_dist.methods.squeezed import Squeezed
from quest_dist.methods.streaming import Streaming
from quest_dist.methods.traffic import CacheShape
from quest_dist.prepare import prepare

S = 4


def test_the_sequence_by_hand() -> None:
    # 99 tokens beside the new one: from 2 x 99 - 4 = 194 down to 99 // 20 = 4, by 47.5 a layer.
    assert pyramid(100, 1000, 5, beta=20) == [195, 148, 100, 52, 5]
    # No layer has more than the 120 tokens that there are: the last ones get what that leaves.
    assert pyramid(100, 120, 5, beta=20) == [120, 110, 100, 90, 80]
    # A window of 20 that all keep: 80 are shared, from 156 to 4.
    assert pyramid(100, 1000, 3, beta=20, reserved=20) == [176, 100, 24]
    # 100 tokens are 6 pages of 16; beside the current one 5, from 10 to 0, in pages.
    assert pyramid(100, 1000, 3, beta=20, unit=16, reserved=16) == [176, 96, 16]
    assert pyramid(100, 1000, 3, beta=1) == [100, 100, 100]
    assert pyramid(100, 1000, 1, beta=20) == [100]
    assert pyramid(100, 100, 4, beta=20) == [100] * 4


@pytest.mark.parametrize("unit", [1, 16])
@pytest.mark.parametrize("layers", [1, 2, 28, 31])
def test_the_mean_is_the_budget_and_no_layer_gets_more_than_there_is(
    layers: int, unit: int
) -> None:
    for budget in (*range(20, 40), 77, 128, 1000, 1023, 4096):
        for length in (budget - 1, budget, budget + 1, budget + 2, 2 * budget, 9 * budget + 5):
            for beta in (1, 2.5, 20):
                found = pyramid(budget, length, layers, beta=beta, unit=unit, reserved=20)
                if budget >= length:
                    assert found == [budget] * layers
                    continue
                assert sum(found) == layers * (budget // unit * unit)
                assert found == sorted(found, reverse=True)
                assert max(found) <= -(-length // unit) * unit
                assert min(found) >= least(budget, beta=beta, unit=unit, reserved=20)
                assert all(share % unit == 0 for share in found)


def test_early_layers_attend_to_more_and_the_mean_is_planned_exactly() -> None:
    stream = Stream.random(100, layers=6)
    build = method_spec("streaming", layer_budgets="pyramid").build
    run = decode(stream, build, [20, 90], prefix=90, page_size=S, dense_layers=1)
    # Five sinks and the new token aside, 15 tokens: from 30 to 0, over five layers.
    for step in run.steps:
        wanted = [35, 28, 20, 12, 5][step.layer - 1]
        assert len(tokens_of(step, 0, 0)) == wanted
        assert len(tokens_of(step, 1, 0)) == 90
    [small, ample] = run.batch.measured
    assert small.attended == small.planned_low == small.planned_high == 10 * 20
    assert ample.attended == ample.planned_low == 10 * 90
    token = CacheShape(2, 16, 4, S).token_bytes
    dense = sum(range(91, 101)) * token
    assert small.bytes_moved == small.bytes_held == dense + 10 * 5 * 20 * token


def test_bytes_are_summed_over_layers_that_choose_pages_or_do_not() -> None:
    stream = Stream.random(42, layers=3)
    build = method_spec("quest", gqa="max", layer_budgets="pyramid").build
    run = decode(stream, build, [36], prefix=41, page_size=S)
    # Nine pages: the current one, and of the ten others 10, 8 and 6.
    assert [len(tokens_of(step, 0, 0)) for step in run.steps] == [42, 34, 26]
    shape = CacheShape(2, 16, 4, S)
    [measured] = run.batch.measured
    metadata = 2 * shape.pages_bytes(10)  # of the two layers that leave pages out
    assert measured.bytes_moved == (42 + 34 + 26) * shape.token_bytes + metadata


def test_one_layer_alone_has_the_whole_budget() -> None:
    group = Group(Quest(layer_budgets="pyramid"), [16], 1, 2)
    group.begin([100], Stream.random(4, layers=3).geometry, S, one_prefix=True)
    assert group.layers_of(0) == {16: [0]}


def test_what_every_layer_needs_is_not_shared_out() -> None:
    assert SnapKV(window=24).reserved(16) == 24
    assert Streaming(sinks=4).reserved(16) == 5
    assert Quest().reserved(16) == 16
    assert Quest(variant="eval_compat").reserved(16) == 48


class Wide(Streaming):
    """Sinks that a pyramid takes away."""

    def reserved(self, page_size: int) -> int:
        """The new token."""
        return 1


@pytest.mark.parametrize(
    ("method", "budget", "message"),
    [
        (Quest(layer_budgets="cone"), 64, "layer_budgets='cone': choose one of uniform, pyramid"),
        (Quest(pyramid_beta=0.5), 64, r"pyramid_beta=0\.5: choose a number of at least 1"),
        (Quest(pyramid_beta="steep"), 64, "pyramid_beta='steep': choose a number"),
        (Full(layer_budgets="pyramid"), None, "pyramid: there is no budget to share out"),
        (Squeezed(layer_budgets="pyramid"), 64, "pyramid: its layers share one budget by them"),
        (Quest(layer_budgets="pyramid"), 0, "budget=0: a query attends to at least 1"),
        (
            Wide(layer_budgets="pyramid"),
            40,
            "layer_budgets=pyramid leaves the last layer 2 tokens of 40: budget=2: streaming",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused(method: Quest, budget: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method.check_layers(budget, 16)


SWEEP = ["grid.model=[smollm2]", "grid.task=[passkey]", "grid.method=[quest]", "grid.budget=[64]"]


def test_it_is_a_setting_of_a_method_and_refused_before_a_worker_starts() -> None:
    sweep = prepare(composed([*SWEEP, "method.quest.layer_budgets=pyramid"]))
    plain = prepare(composed(SWEEP))
    assert sweep.points[0].key != plain.points[0].key
    with pytest.raises(ValueError, match="method quest: layer_budgets='cone': choose one of"):
        prepare(composed([*SWEEP, "method.quest.layer_budgets=cone"]))
    timed = [*SWEEP, "grid.task=[kernels_1k]", "method.quest.gqa=max"]
    with pytest.raises(ValueError, match="layer_budgets=pyramid gives each layer a number of"):
        prepare(composed([*timed, "method.quest.layer_budgets=pyramid"]))


def test_latency_mode_refuses_it() -> None:
    with pytest.raises(ValueError, match="quest: layer_budgets=pyramid gives each layer"):
        page_rule(Group(Quest(layer_budgets="pyramid"), [64], 0))
