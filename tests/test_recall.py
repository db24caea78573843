"""Recall: shadows change nothing that is dense, and count what brute force counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cache_harness import BUDGETED, METHODS, Step, method_spec, record, tokens_of
from test_engine import point, sample
from tiny_language import tiny_language
from tiny_models import tiny_loaded

from quest_dist import engine, ops, recall
from quest_dist.attention import patch
from quest_dist.batch import Group
from quest_dist.engine import Evaluated
from quest_dist.methods.method import Selection
from quest_dist.models import LoadedModel
from quest_dist.plan import Point
from quest_dist.tasks.passkey import Passkey
from quest_dist.tasks.recall import Recall
from quest_dist.tasks.task import Outcome, Sample

SAMPLE = sample(info={"top": 10})
GRID = [
    *(point(name) for name in METHODS if name not in BUDGETED),
    *(point(name, budget) for budget in (12, 24) for name in METHODS if name in BUDGETED),
]


def facts(place: str = "cpu", points: list[Point] = GRID, **changes: object) -> list[Evaluated]:
    return recall.evaluate(tiny_loaded(device=place), replace(SAMPLE, **changes), points)


def test_shadows_leave_the_dense_row_what_it_is_alone(place: str) -> None:
    loaded = tiny_loaded(device=place)
    expected = engine.evaluate(loaded, sample(), [point("full")])[0].outcome.token_ids
    found = recall.evaluate(loaded, SAMPLE, GRID)
    assert {result.outcome.token_ids for result in found} == {expected}
    for result in found:
        assert result.planned_low - 1e-6 <= result.attended <= result.planned_high + 1e-6


def test_a_point_has_the_recall_that_it_has_alone(place: str) -> None:
    together = facts(place)
    for number, result in enumerate(together):
        [alone] = facts(place, [GRID[number]])
        assert alone.outcome.facts == pytest.approx(result.outcome.facts)
        assert alone.outcome.facts["recall"] == result.outcome.facts["recall"]
        assert (alone.attended, alone.read) == (result.attended, result.read)


def test_full_and_the_token_oracle_have_100_and_a_smaller_oracle_has_not(place: str) -> None:
    full, enough, small = facts(
        place, [point("full"), point("oracle_token", 11), point("oracle_token", 8)]
    )
    assert full.outcome.facts == pytest.approx(
        {"recall": 100, "recall_1": 100, "recall_10": 100, "recall_100": 100, "mass": 100}
    )
    assert enough.outcome.facts["recall"] == pytest.approx(100)
    # Seven best tokens and the new one: 70 to 80 % of the ten best.
    assert 70 <= small.outcome.facts["recall"] <= 80
    assert small.outcome.facts["recall_1"] == pytest.approx(100)


@pytest.mark.parametrize("name", [name for name in METHODS if name in BUDGETED])
def test_recall_is_what_brute_force_counts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"gqa": "max"} if name == "tightbound" else {}  # one list a kv head
    steps: list[Step] = []
    build = recall.groups_of

    def watched(loaded: LoadedModel, points: list[Point]) -> tuple[list[Group], list[int]]:
        nonlocal steps
        groups, order = build(loaded, points)
        steps = record(groups[0].method)
        return groups, order

    monkeypatch.setattr(recall, "groups_of", watched)
    results = facts(points=[point(name, budget, **settings) for budget in (9, 21)])
    assert len(steps) == 13 * 3  # six of the tail, seven generated; three layers of four
    for row, result in enumerate(results):
        counted, weight = [], []
        for step in steps:
            view = step.view
            keys, _ = ops.gather(view.kv, view.page_table[:1], view.lengths_list[0])
            keys = keys[0].double().repeat_interleave(view.heads // view.kv_heads, 0)
            scores = torch.einsum("hd,hld->hl", step.q[row].double(), keys) * view.scale
            for head in range(view.heads):
                top = set(scores[head].topk(10).indices.tolist())
                mine = tokens_of(step, row, head)
                counted.append(len(top & set(mine)) / 10)
                weight.append(float(scores[head].softmax(-1)[mine].sum()))
        found = result.outcome.facts
        assert found["recall"] == pytest.approx(100 * sum(counted) / len(counted))
        assert found["mass"] == pytest.approx(100 * sum(weight) / len(weight), abs=1e-3)
        curve = [y for _, y in result.outcome.curve]
        assert curve[-1] == pytest.approx(100 * sum(counted[-12:]) / 12)
        assert sum(curve) / len(curve) == pytest.approx(found["recall"])


def test_streaming_by_hand() -> None:
    selection = Selection(
        torch.tensor([[[0, 1, 7, 8, 9, -1]], [[0, 1, 6, 7, 8, 9]]], dtype=torch.int32),
        torch.tensor([[5], [6]], dtype=torch.int32),
        "tokens",
    )
    view = _view(lengths=(10, 10))
    top = torch.tensor([[0, 5, 6, 9], [2, 3, 4, 5]])  # of two query heads
    held = recall.held(selection, view, top)
    assert held[0].tolist() == [[True, False, False, True], [False] * 4]
    assert held[1].tolist() == [[True, False, True, True], [False] * 4]
    shares = torch.tensor([[0.1] * 10, [0.0] * 9 + [1.0]])
    assert torch.allclose(recall.mass(selection, view, shares), torch.tensor([[0.5, 1], [0.6, 1]]))


def test_pages_by_hand_one_row_holding_everything() -> None:
    index = torch.tensor([[[0, 2], [1, 2]], [[-1, -1], [-1, -1]]], dtype=torch.int32)
    count = torch.tensor([[2, 2], [-1, -1]], dtype=torch.int32)
    selection, view = Selection(index, count, "pages"), _view(lengths=(10, 10))
    held = recall.held(selection, view, torch.tensor([[3, 4, 9]]).expand(4, -1))
    assert held[0].tolist() == [[True, False, True]] * 2 + [[False, True, True]] * 2
    assert bool(held[1].all())
    shares = torch.full((4, 10), 0.1)
    found = recall.mass(selection, view, shares)
    assert torch.allclose(found, torch.tensor([[0.6] * 4, [1.0] * 4]))


def _view(lengths: tuple[int, ...]) -> recall.View:
    nothing = torch.empty(0)
    held = torch.tensor(lengths, dtype=torch.int32)
    return recall.View(0, 1, nothing, nothing, nothing, held, lengths, 4, 4, 2, 1.0, lambda q, _: q)


def test_recall_does_not_fall_with_the_budget_of_a_method_that_forgets_nothing() -> None:
    for name in ("quest", "tightbound", "oracle_page", "oracle_token", "streaming"):
        found = [
            r.outcome.facts["recall"]
            for r in facts(points=[point(name, b) for b in (8, 16, 32, 80)])
        ]
        assert found == sorted(found)
        assert found[-1] == pytest.approx(100)


def test_no_layer_to_ask_in_is_refused() -> None:
    with pytest.raises(ValueError, match="dense_layers=4: of 4 none is asked"):
        facts(points=[point("quest", 8, dense_layers=4)])


def test_the_pool_is_as_it_was_when_shadows_are_gone() -> None:
    loaded = tiny_loaded()
    groups = [Group(method_spec("h2o").build(), [8, 16], 1)]
    with torch.inference_mode(), patch(loaded.model, lambda rows: groups, 4) as patched:
        prefix = engine.prefill(loaded, patched, SAMPLE, groups, 1)
        shadow = recall.Shadow(prefix, groups, (10,))
        engine.decode(loaded, SAMPLE, shadow, [0])
        held = prefix.pool.pages - prefix.pool.free_pages
        # 60 tokens of the prefix and 13 of the dense row, in pages of 4; shadows hold none.
        assert held == 15 + (19 - 15)
        assert shadow.asked.rows.lengths_list == [73, 73]


def test_the_task_asks_over_the_passkeys_prompts() -> None:
    task, language = Recall(length=512, top=7), tiny_language()
    made, same = task.sample(3, language), Passkey(length=512).sample(3, language)
    assert isinstance(made, Sample)
    assert (made.context, made.tail, made.answers) == (same.context, same.tail, same.answers)
    assert made.info == {**same.info, "top": 7}
    assert task.score(made, Outcome("", facts={"recall": 61.5})) == 61.5
    assert task.identity() != Passkey(length=512).identity()
    with pytest.raises(ValueError, match=r"task.top=0: choose 1 to task.length=4096"):
        Recall(top=0)
