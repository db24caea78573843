"""DejaVu's heads: which are kept, what the others give, and predictors that learn something."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cache_harness import Run, Stream, decode, tokens_of
from safetensors.torch import save_file
from tiny_models import tiny_loaded
from torch import Tensor

import quest_dist
from quest_dist import artefacts
from quest_dist.calibrators import dejavu as calibrator
from quest_dist.methods.dejavu import DejaVu, features, predicted_norms
from quest_dist.methods.full import Full
from quest_dist.methods.traffic import CacheShape

S = 4


def run(stream: Stream, budgets: list[int], prefix: int, **settings: object) -> Run:
    artefact = settings.pop("artefact", None)

    def make() -> DejaVu:
        return DejaVu(artefact=artefact, **settings)

    return decode(stream, make, budgets, prefix=prefix, page_size=S)


def kept(result: Run, step: int, row: int) -> list[int]:
    heads = result.steps[step].view.heads
    return [h for h in range(heads) if tokens_of(result.steps[step], row, h)]


def test_the_heads_of_largest_output_are_kept_to_the_bit_and_others_give_nothing() -> None:
    stream = Stream.random(64, heads=8)
    dense = decode(stream, Full, [0], prefix=60, page_size=S)
    result = run(stream, [8, 20, 40], 60)
    for step in range(4):
        length, whole = 61 + step, dense.outputs[step, 0, 0]
        order = whole.norm(dim=-1).argsort(descending=True).tolist()
        for row, budget in enumerate([8, 20, 40]):
            heads = sorted(order[: max(1, 8 * budget // length)])
            assert kept(result, step, row) == heads
            wanted = torch.zeros_like(whole)
            wanted[heads] = whole[heads]
            assert torch.equal(result.outputs[step, row, 0], wanted)


def test_the_budget_is_the_mean_over_heads() -> None:
    result = run(Stream.random(70, heads=8), [16, 33, 3], 64)
    for number, step in enumerate(result.steps):
        length = 65 + number
        # Eight heads at 33: four of 65 and 66 tokens, then three.
        assert step.attended.attended.sum(1).tolist() == [
            length,
            (4 if length <= 66 else 3) * length,
            length,
        ]
    means = [measured.attended / 6 for measured in result.batch.measured]
    assert means[0] <= 16
    assert means[1] <= 33
    assert means[1] > 24
    assert means[2] > 3  # a head is the least: 65 tokens / 8 heads
    for measured in result.batch.measured:
        assert measured.planned_low - 1e-9 <= measured.attended <= measured.planned_high + 1e-9
        assert measured.planned_high - measured.planned_low <= 6


def test_a_kv_head_is_read_where_a_head_of_its_group_is_kept() -> None:
    result = run(Stream.random(64, heads=4, kv_heads=2), [16, 40], 60)
    for step in result.steps:
        length = step.view.lengths_list[0]
        for row in range(2):
            heads = {head for head in range(4) if tokens_of(step, row, head)}
            wanted = [length if heads & {2 * g, 2 * g + 1} else 0 for g in range(2)]
            assert step.attended.read[row].tolist() == wanted


def test_an_oracle_moves_everything_and_a_predictor_what_it_reads() -> None:
    shape = CacheShape(kv_heads=2, head_dim=16, element_bytes=4, page_size=S)
    assert DejaVu().bytes_moved(shape, 100, 25, 30.0) == 100 * shape.token_bytes
    predicted = DejaVu(heads="predicted")
    assert predicted.bytes_moved(shape, 100, 25, 30.0) == 30 * shape.token_bytes
    assert predicted.bytes_held(shape, 100, 25) == 100 * shape.token_bytes


def planted(path: Path, heads: int, inputs: int, layers: int = 1) -> str:
    """Predictors of one hidden unit that is the first query channel: head 1 where it is positive,
    head 2 otherwise."""
    weights = {
        "mean": torch.zeros(layers, inputs),
        "scale": torch.ones(layers, inputs),
        "w1": torch.zeros(layers, inputs, 1),
        "b1": torch.zeros(layers, 1),
        "w2": torch.zeros(layers, 1, heads),
        "b2": torch.zeros(layers, heads),
        "norm_mean": torch.zeros(layers, heads),
        "norm_scale": torch.ones(layers, 1),
    }
    weights["w1"][:, 0] = 1.0
    weights["w2"][:, 0, 1] = 100.0
    weights["norm_mean"][:, 2] = 1e-3
    save_file(weights, path)
    return str(path)


def test_predicted_heads_are_those_that_the_predictor_ranks_first(tmp_path: Path) -> None:
    stream = Stream.random(70, heads=4)
    artefact = planted(tmp_path / "p.safetensors", heads=4, inputs=64)
    dense = decode(stream, Full, [0], prefix=60, page_size=S)
    result = run(stream, [20, 100], 60, heads="predicted", artefact=artefact)
    seen = set()
    for step in range(10):
        head = 1 if stream.q[0, 0, 60 + step, 0] > 0 else 2
        seen.add(head)
        assert kept(result, step, 0) == [head]
        assert torch.equal(result.outputs[step, 0, 0, head], dense.outputs[step, 0, 0, head])
        assert not result.outputs[step, 0, 0].index_select(0, torch.tensor([0, 3 - head, 3])).any()
        assert torch.equal(result.outputs[step, 1], dense.outputs[step, 0])
    assert seen == {1, 2}


def test_without_its_artefact_a_predictor_says_how_to_make_one() -> None:
    with pytest.raises(ValueError, match="heads=predicted needs its predictors; python -m quest_"):
        DejaVu(heads="predicted")._predictors()
    with pytest.raises(ValueError, match="heads='all': choose one of oracle, predicted"):
        DejaVu(heads="all")
    assert DejaVu().calibration is None
    assert DejaVu(heads="predicted").calibration == "dejavu"


def test_a_network_learns_norms_that_follow_from_queries() -> None:
    draw = torch.Generator().manual_seed(3)
    mixing = torch.randn(24, 6, generator=draw)
    queries = [torch.randn(1200, 6, 4, generator=draw) for _ in range(4)]
    norms = [(features(x) @ mixing / 5).relu().add(0.1) for x in queries]
    made = calibrator._trained(queries, norms, seed=0)
    assert made["recall"].shape == made["static"].shape == (6,)
    assert float(made["recall"][-1]) == float(made["static"][-1]) == 1.0
    assert float(made["static"][0]) < 0.45
    assert float(made["recall"][0]) > 0.75
    again = calibrator._trained(queries, norms, seed=0)
    assert all(torch.equal(made[name], again[name]) for name in made)


def test_recall_by_hand() -> None:
    true = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    found = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    assert calibrator._recall(found, true).tolist() == [0.5, 0.75, 1.0]


def test_predictors_are_made_from_a_model_and_see_what_it_will_show_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = tiny_loaded()
    tokens = torch.randint(1, 97, (3, 96), generator=torch.Generator().manual_seed(4))
    with torch.inference_mode(), torch.inference_mode(False):
        weights = calibrator.make(loaded, tokens, {})
    assert weights["recall"].shape == (4, 4)
    assert weights["w1"].shape == (4, 64, calibrator.HIDDEN)
    place = tmp_path / "dejavu.safetensors"
    made_of = artefacts.recipe("dejavu", vars(DejaVu(heads="predicted")), loaded.identity, "")
    artefacts.write(weights, made_of, place)

    seen: list[Tensor] = []

    def spy(x: Tensor, weights: dict[str, Tensor], layer: int) -> Tensor:
        seen.append(x)
        return predicted_norms(x, weights, layer)

    monkeypatch.setattr("quest_dist.methods.dejavu.predicted_norms", spy)
    ids, settings = tokens[:1], {"heads": "predicted", "artefact": str(place)}
    with (
        torch.inference_mode(),
        quest_dist.patched(loaded.model, "dejavu", 40, page_size=S, dense_layers=0, **settings),
    ):
        cache = loaded.model(ids[:, :95]).past_key_values
        loaded.model(ids[:, 95:], past_key_values=cache)
    watched = calibrator._watch(loaded, ids)
    # Below the first layer hidden states differ: heads have been skipped.
    assert torch.allclose(seen[0][0], features(watched.queries[0][0])[-1], atol=1e-4)
    assert len(seen) == 4
    assert torch.equal(features(torch.ones(2, 3, 4)), torch.ones(2, 12))
