"""Oracles of Squeezed Attention: scores of clusters, thresholds, what is kept."""

from __future__ import annotations

import pytest
import torch
from cache_harness import Stream, decode, method_spec, tokens_of
from torch import Tensor

from quest_dist import ops
from quest_dist.methods.clusters import Clusters, clustered, grouped
from quest_dist.methods.fixed_context import Calibration, FixedContext, Layer, Prefilled
from quest_dist.methods.squeezed import Squeezed, lists_of

S = 4


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def context(coarse: float | None = None, layers: int = 3, window: int = 20) -> FixedContext:
    """A context of 220 tokens, two kv heads and four query heads, some keys alike."""
    seen = {}
    for layer in range(layers):
        keys = normal(2, 11, 16, seed=layer).repeat_interleave(20, 1) * 2
        keys = keys + normal(2, 220, 16, seed=layer + 50)
        seen[layer] = Prefilled(normal(30, 4, 16, seed=layer + 90), keys, 0.25)
    return FixedContext(seen, window, 0.1, coarse)


def test_scores_of_all_tokens_add_up_to_one() -> None:
    found = clustered(normal(2, 90, 16), 9)
    scores = found.scores(normal(5, 4, 16, seed=1), 0.25)
    assert scores.shape == (5, 2, 9)
    assert torch.allclose((scores * found.size).sum(-1), torch.ones(5, 2), atol=1e-5)
    some = torch.zeros(5, 2, 9, dtype=torch.bool)
    some[..., 2:5] = True
    fewer = found.scores(normal(5, 4, 16, seed=1), 0.25, some)
    assert torch.allclose((fewer * found.size).sum(-1), torch.ones(5, 2), atol=1e-5)
    assert bool((fewer[~some] == 0).all())


def test_one_token_a_cluster_scores_as_attention_does() -> None:
    keys, q = normal(2, 30, 16), normal(1, 4, 16, seed=1)
    alone = grouped(keys, torch.arange(30).expand(2, -1), 30)
    exact = torch.einsum("gid,gkd->gik", q[0].view(2, 2, 16), keys).mul(0.25).softmax(-1).mean(1)
    assert torch.allclose(alone.scores(q, 0.25)[0], exact, atol=1e-6)
    # As k-means finds them: distinct directions are distinct clusters.
    found = clustered(keys, 30)
    assert torch.allclose(found.scores(q, 0.25)[0].gather(1, found.label), exact, atol=1e-6)


def test_a_cluster_weighs_what_its_tokens_weigh() -> None:
    """Two keys, one of them three times: tokens of the same key score as in plain attention."""
    keys = torch.tensor([[[2.0, 0.0], [0.0, 1.0], [2.0, 0.0], [2.0, 0.0]]])
    found = clustered(keys, 2)
    scores = found.scores(torch.tensor([[[1.0, 1.0]]]), 1.0)[0].gather(1, found.label)
    weights = torch.tensor([2.0, 1.0, 2.0, 2.0]).exp()
    assert torch.allclose(scores[0], weights / weights.sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_large_logits_do_not_overflow(dtype: torch.dtype) -> None:
    keys, q = normal(1, 60, 16).to(dtype), normal(2, 3, 16, seed=1).to(dtype)
    scale = 200 / float((q.float()[:, 0] @ keys.float()[0].T).max())
    found = clustered(keys, 6)
    assert found.centroid.dtype == torch.float32
    scores = found.scores(q, scale)
    assert bool(scores.isfinite().all())
    assert torch.allclose((scores * found.size).sum(-1), torch.ones(2, 1), atol=1e-4)


def test_empty_clusters_weigh_nothing() -> None:
    keys, q = normal(1, 8, 16), normal(1, 2, 16, seed=1)
    label = torch.tensor([[0, 0, 1, 1, 1, 3, 3, 3]])
    with_empty, without = grouped(keys, label, 5), grouped(keys, label.clamp(max=2), 3)
    scores = with_empty.scores(q, 0.25)[0, 0]
    assert torch.equal(scores[[0, 1, 3]], without.scores(q, 0.25)[0, 0])
    assert scores[[2, 4]].tolist() == [0.0, 0.0]
    same = clustered(torch.ones(1, 8, 16), 4)  # fewer directions than clusters
    assert bool(same.scores(q, 0.25).isfinite().all())


def test_keys_of_a_direction_are_a_cluster_and_centroids_are_means_of_raw_keys() -> None:
    directions = torch.eye(16)[:5]
    label = torch.arange(60) % 5
    lengths = 1 + torch.arange(60) / 10
    keys = directions[label] * lengths[:, None]
    found = clustered(keys[None], 5)
    for number in range(5):
        mine = found.label[0] == found.label[0, number]
        assert torch.equal(mine, label == number)
        mean = keys[mine].mean(0)
        assert torch.allclose(found.centroid[0, found.label[0, number]], mean, atol=1e-6)


def test_clusters_do_not_depend_on_threads() -> None:
    keys = normal(2, 700, 16)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = clustered(keys, 35)
        torch.set_num_threads(2)
        assert torch.equal(one.label, clustered(keys, 35).label)
    finally:
        torch.set_num_threads(before)


def test_the_threshold_keeps_what_was_asked_for_on_average() -> None:
    score = torch.tensor([[[0.5, 0.1, 0.2]], [[0.05, 0.3, 0.1]]])  # two queries, one list
    size = torch.tensor([[1.0, 4.0, 3.0]])
    found = Calibration([score], [size])
    # Best first: .5 of 1 token, .3 of 4, .2 of 3, .1 of 4 and of 3, .05 of 1; halved a query.
    assert [found.threshold(t) for t in (2.4, 2.5, 4.0)] == pytest.approx([0.3, 0.2, 0.1])
    assert found.kept(found.threshold(4.0)) == 4.0
    assert found.kept(found.threshold(5.0)) == 4.0  # the tie goes with its equals
    assert found.threshold(8.0) == -1.0
    assert found.threshold(0.0) == float("inf")


@pytest.mark.parametrize("coarse", [None, 0.03])
def test_window_queries_keep_the_budget_on_average(coarse: float | None) -> None:
    found = context(coarse)
    limit, calibration = found.calibrate(60.0)
    threshold = calibration.threshold(60.0)
    kept = [
        found.kept(layer, q, scale, limit, threshold).sum(-1).float().mean()
        for layer, (queries, scale) in found._queries.items()
        for q in queries
    ]
    assert len(kept) == 3 * 20
    assert 55.0 < float(torch.stack(kept).mean()) <= 60.0 + 1e-4


def test_thresholds_at_both_ends_keep_everything_and_nothing() -> None:
    found = context()
    q = normal(4, 16, seed=8)
    assert bool(found.kept(0, q, 0.25, None, 0.0).all())
    assert not bool(found.kept(0, q, 0.25, None, float("inf")).any())


def test_with_all_coarse_clusters_kept_two_levels_are_one() -> None:
    keys, q = normal(2, 200, 16), normal(6, 4, 16, seed=1)
    both, flat = Layer.of(keys, 0.1, 0.03), Layer.of(keys, 0.1, None)
    assert both.coarse is not None
    assert both.coarse.size.shape == (2, 6)
    assert torch.equal(both.scores(q, 0.25, -1.0), flat.scores(q, 0.25, None))
    dropped = both.scores(q, 0.25, 1 / 200)
    gone = (dropped == 0).gather(2, both.fine.label.expand(6, -1, -1))
    low = both.coarse.scores(q, 0.25) <= 1 / 200
    assert torch.equal(gone, low.gather(2, both.coarse.label.expand(6, -1, -1)))
    assert 0.1 < gone.float().mean() < 0.9


def test_attention_over_kept_and_dropped_merges_to_that_over_all() -> None:
    stream = Stream.random(60)
    build = method_spec("squeezed", clusters=0.3, window=10).build
    step = decode(stream, build, [30], prefix=59, page_size=S).steps[0]
    view, q = step.view, step.q
    listed = torch.zeros(2, 60, dtype=torch.bool)
    for head in range(2):
        listed[head, tokens_of(step, 0, 2 * head)] = True
    assert 0 < int((~listed).sum()) < 120
    index, count = lists_of(~listed[None])
    rest = ops.attend(q, view.kv, view.page_table, view.lengths, index, count, "tokens", view.scale)
    whole = ops.attend(q, view.kv, view.page_table, view.lengths, scale=view.scale)
    share = torch.sigmoid(step.attended.lse - rest.lse)[..., None]
    merged = share * step.attended.out + (1 - share) * rest.out
    assert torch.allclose(merged, whole.out, atol=1e-5)


def real(tokens: int) -> Stream:
    """Neighbouring keys are alike, and queries look for keys."""
    stream = Stream.random(tokens, layers=2)
    centres = normal(2, 2, tokens // 10 + 1, 16, seed=3).repeat_interleave(10, 2)[:, :, :tokens]
    stream.k[:] = centres * 2 + stream.k * 0.5
    return stream


def test_window_and_decoded_tokens_are_kept_and_the_rest_is_about_the_budget() -> None:
    run = decode(real(430), lambda: Squeezed(window=30), [90, 150], prefix=400, page_size=S)
    for step in run.steps:
        for row in range(2):
            tokens = tokens_of(step, row, 0)
            assert set(range(370, step.view.lengths_list[row])) <= set(tokens)
            assert tokens == sorted(set(tokens))
    for measured, budget in zip(run.batch.measured, (90, 150), strict=True):
        assert 0.7 < measured.attended / measured.steps / budget < 1.3
        assert measured.planned_low <= measured.attended <= measured.planned_high
        assert measured.planned_high < 400 * measured.steps


def test_what_was_decoded_beyond_the_budget_is_still_attended() -> None:
    build = method_spec("squeezed", clusters=0.5, window=6).build
    run = decode(Stream.random(90), build, [20], prefix=60, page_size=S)
    assert tokens_of(run.steps[-1], 0, 0) == list(range(54, 90))
    assert len(set(tokens_of(run.steps[0], 0, 0)) - set(range(54, 61))) > 0


def test_rows_of_one_prefix_share_their_clusters() -> None:
    made: list[Squeezed] = []

    def build() -> Squeezed:
        made.append(Squeezed(window=20))
        return made[-1]

    decode(Stream.random(110), build, [40, 60, 80, 12], prefix=100, page_size=S)
    assert {key: len(c.layers) for key, c in made[-1]._contexts.items()} == {(0, 20): 1, (0, 6): 1}
    assert made[-1]._rows[0].context is made[-1]._rows[2].context


def test_a_needle_in_an_old_cluster_is_kept() -> None:
    stream = Stream.random(300)
    stream.k[0, :, 100:110] = 5.0 * normal(2, 1, 16, seed=5)
    stream.q[0, :, 290:] = stream.k[0, :, 100:101].repeat_interleave(2, 0)
    run = decode(stream, lambda: Squeezed(window=20), [60], prefix=290, page_size=S)
    assert set(range(100, 110)) <= set(tokens_of(run.steps[0], 0, 0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clusters": 0.0}, "clusters=0.0: choose a number above 0"),
        ({"clusters": 1.5}, "clusters=1.5"),
        ({"coarse_clusters": 0.2}, "coarse_clusters=0.2: .* up to clusters=0.05"),
        ({"window": 0}, "window=0: .* choose 1 or more"),
    ],
)
def test_settings_are_checked(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Squeezed(**settings)


def test_least_budget() -> None:
    with pytest.raises(ValueError, match="budget=1: squeezed needs at least 2"):
        Squeezed().check_budget(1, 16)
    Squeezed().check_budget(2, 16)


def test_clusters_are_of_any_shape() -> None:
    one = Clusters(torch.zeros(1, 3).long(), torch.ones(1, 1, 4), torch.full((1, 1), 3.0))
    assert torch.allclose(one.scores(torch.ones(1, 2, 4), 1.0), torch.full((1, 1, 1), 1 / 3))
