"""Sparsity by layer: one sparse layer at a time, and running perplexity by position."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from cache_harness import method_spec
from test_engine import TOKENS, point, sample
from tiny_models import tiny_loaded

from quest_dist import cost, engine, sparsity
from quest_dist.attention import PagedCache, patch
from quest_dist.batch import Group
from quest_dist.methods.full import Full
from quest_dist.plan import Point, Spec
from quest_dist.tasks.generated import Generated
from quest_dist.tasks.pg19 import PG19
from quest_dist.tasks.sparsity import Sparsity
from quest_dist.tasks.task import Sample

LAYERS = 4


def scored(**changes: object) -> Sample:
    """Forty tokens of context and twenty to predict."""
    facts = {"context": tuple(TOKENS[:40]), "tail": tuple(TOKENS[40:60]), "max_new_tokens": 0}
    return sample(**{**facts, "score_tail": True, **changes})


def sparse_points(*names: str, budgets: Sequence[int] = (8, 16)) -> list[Point]:
    """Points without dense layers."""
    return [point(name, budget, dense_layers=0) for name in names for budget in budgets]


def alone(name: str, budget: int, layer: int) -> float:
    """The mean NLL of a run of its own whose method is active in one layer: by swapping methods
    between layers, without any groups' help."""
    loaded, text = tiny_loaded(), scored()
    group = Group(method_spec(name).build(), [budget], layer)

    class Once(Group):
        def active(self, at: int) -> bool:
            return at == layer

    group = Once(group.method, group.budgets, 0)
    with torch.inference_mode(), patch(loaded.model, lambda rows: [group], 4) as patched:
        prefix = engine.prefill(loaded, patched, text, [group], 1)
        rows, _ = engine.decode(loaded, text, prefix.fork([group]), [0])
    return math.fsum(rows[0].nll) / len(rows[0].nll)


@pytest.mark.parametrize("name", ["quest", "oracle_token", "h2o"])
def test_a_curve_is_that_of_runs_with_one_sparse_layer_each(name: str) -> None:
    points = sparse_points(name, "tightbound")
    results = sparsity.evaluate(tiny_loaded(), scored(), points)
    dense = engine.evaluate(tiny_loaded(), scored(), [point("full")])[0].outcome.nll
    base = math.fsum(dense) / len(dense)
    for each, result in zip(points[:2], results, strict=False):
        assert [x for x, _ in result.outcome.curve] == [0, 1, 2, 3]
        assert result.outcome.facts["dense_nll"] == pytest.approx(base, abs=1e-5)
        expected = [alone(name, each.budget or 0, layer) - base for layer in range(LAYERS)]
        assert [y for _, y in result.outcome.curve] == pytest.approx(expected, abs=1e-5)
        assert max(map(abs, expected)) > 1e-3
        assert result.planned_low - 1e-6 <= result.attended <= result.planned_high + 1e-6
        assert result.attended < 20


def test_a_budget_that_holds_everything_costs_exactly_nothing() -> None:
    points = [*sparse_points("quest", "oracle_token", budgets=(60, 8)), point("full")]
    results = sparsity.evaluate(tiny_loaded(), scored(), points)
    for number in (0, 2, 4):
        assert {y for _, y in results[number].outcome.curve} == {0.0}
        assert results[number].attended == 50.5
    assert any(y for _, y in results[1].outcome.curve)


def test_rows_are_cut_into_batches_that_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    points = sparse_points("quest", "tova", budgets=(8, 12, 16))
    whole = sparsity.evaluate(tiny_loaded(), scored(), points)
    monkeypatch.setattr(sparsity, "MOST_ROWS", 3)
    cut = sparsity.evaluate(tiny_loaded(), scored(), points)
    for one, other in zip(whole, cut, strict=True):
        ours, theirs = ([y for _, y in each.outcome.curve] for each in (one, other))
        assert ours == pytest.approx(theirs, abs=1e-5)
        assert one.attended == other.attended


def test_layers_can_be_chosen_and_dense_ones_are_left_out() -> None:
    def with_layers(each: Point, layers: list[int] | None) -> Point:
        return replace(each, task=Spec("sparsity", {"layers": layers}))

    points = [with_layers(each, [3, 1]) for each in sparse_points("quest")]
    every = sparsity.evaluate(tiny_loaded(), scored(), sparse_points("quest"))
    some = sparsity.evaluate(tiny_loaded(), scored(), points)
    for one, other in zip(every, some, strict=True):
        assert other.outcome.curve == (
            pytest.approx(one.outcome.curve[1], abs=1e-5),
            pytest.approx(one.outcome.curve[3], abs=1e-5),
        )
    late = sparsity.evaluate(tiny_loaded(), scored(), [point("quest", 8, dense_layers=2)])
    assert [x for x, _ in late[0].outcome.curve] == [2, 3]
    with pytest.raises(ValueError, match="dense_layers=4 leaves no layer"):
        sparsity.evaluate(tiny_loaded(), scored(), [point("quest", 8, dense_layers=4)])
    wrong = with_layers(point("quest", 8, dense_layers=0), [9])
    with pytest.raises(ValueError, match=r"task.layers=\[9\]: the model has layers 0..3"):
        sparsity.evaluate(tiny_loaded(), scored(), [wrong])


def test_the_task_scores_its_curves_mean() -> None:
    task = Sparsity(data=Generated(), prefill=40, tokens=19)
    result = sparsity.evaluate(tiny_loaded(), scored(), sparse_points("quest"))[0]
    ys = [y for _, y in result.outcome.curve]
    assert task.score(scored(), result.outcome) == pytest.approx(sum(ys) / LAYERS)
    assert task.curve(scored(), result.outcome) == result.outcome.curve
    for layers in ([], [1, 1], [-1], ["a"]):
        with pytest.raises(ValueError, match=r"task\.layers="):
            Sparsity(data=Generated(), layers=layers)


def test_rows_are_counted_when_time_and_memory_are_estimated() -> None:
    task = {"prefill": 100, "tokens": 8, "layers": None}
    model = {"shape": {"layers": 30}}
    many = tuple(
        replace(each, task=Spec("sparsity", task), model=Spec("any", model))
        for each in sparse_points("quest")
    )
    few = tuple(replace(each, task=Spec("s", {**task, "layers": [1]})) for each in many)
    plain = tuple(replace(each, task=Spec("pg19", {"prefill": 9, "tokens": 8})) for each in many)
    assert [cost.batch_rows(each) for each in (many, few, plain)] == [60, 2, 2]
    assert cost.worker_bytes(many) > cost.worker_bytes(few)


# --- running perplexity ------------------------------------------------------------------------


def test_a_context_of_one_token_is_prefilled(place: str) -> None:
    loaded = tiny_loaded(device=place)
    text = scored(context=tuple(TOKENS[:1]), tail=tuple(TOKENS[1:60]))
    full = engine.evaluate(loaded, text, [point("full")])[0]
    with torch.inference_mode():
        logits = loaded.model(torch.tensor([TOKENS[:59]], device=place)).logits[0, 1:].cpu()
    targets = torch.tensor(TOKENS[2:60])
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    assert torch.allclose(torch.tensor(full.outcome.nll), expected, atol=1e-3)


def test_up_to_the_budget_page_methods_are_full(place: str) -> None:
    text = scored(context=tuple(TOKENS[:1]), tail=tuple(TOKENS[1:70]))
    names = ("quest", "tightbound", "oracle_page", "oracle_token")
    points = [point("full"), *(point(name, 24) for name in names)]
    full, *others = engine.evaluate(tiny_loaded(device=place), text, points)
    for other in others:
        assert other.outcome.nll[:23] == full.outcome.nll[:23]  # made from 2 to 24 tokens
        assert other.outcome.nll[30:] != full.outcome.nll[30:]


@pytest.mark.parametrize(("prefill", "tokens"), [(0, 58), (12, 40), (7, 3)])
def test_the_running_mean_ends_in_the_score(prefill: int, tokens: int) -> None:
    head = max(1, prefill)
    text = scored(context=tuple(TOKENS[:head]), tail=tuple(TOKENS[head : head + tokens + 1]))
    outcome = engine.evaluate(tiny_loaded(), text, [point("quest", 8)])[0].outcome
    task = PG19(data=Generated(), prefill=prefill, tokens=tokens, checkpoints=8)
    curve = task.curve(text, outcome)
    assert curve[-1] == (head + tokens, pytest.approx(task.score(text, outcome)))
    assert [x for x, _ in curve] == sorted({x for x, _ in curve})
    assert len(curve) <= 8
    for x, y in curve:
        count = int(x) - head
        assert y == pytest.approx(sum(outcome.nll[:count]) / count)


def test_rows_of_several_groups_attend_densely_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    from quest_dist.methods.method import View

    calls: list[int] = []
    plain = View.attend

    def counted(self: View, *args: object, **kwargs: object) -> object:
        calls.append(len(self.lengths_list))
        return plain(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(View, "attend", counted)
    loaded = tiny_loaded()
    groups = [Group(method_spec("quest").build(), [8], layer, layer + 1) for layer in range(3)]
    groups.append(Group(Full(), [0], 0))
    with torch.inference_mode(), patch(loaded.model, lambda rows: groups, 4) as patched:
        prefix = engine.prefill(loaded, patched, scored(), groups, 4)
        cache = PagedCache(prefix.fork(groups))
        tokens = torch.full((4, 1), TOKENS[40])
        loaded.model(tokens, past_key_values=cache, position_ids=torch.full((4, 1), 40))
    # The sparse row by itself, then the rows before and after it; all four in the last layer.
    assert calls == [1, 3, 1, 1, 2, 1, 2, 1, 4]
