"""Quest by metadata in int8: what it selects, and what must not change it."""

from __future__ import annotations

import pytest
import torch
from cache_harness import Run, Stream, decode, no_rotation, tokens_of

from quest_dist import ops
from quest_dist.batch import Group, new_batch
from quest_dist.compose import composed
from quest_dist.methods.int8_pages import Int8Pages
from quest_dist.methods.quest import Quest
from quest_dist.methods.tightbound import TightBound
from quest_dist.prepare import prepare

S = 4


def in_int8() -> Quest:
    return Quest(metadata="int8")


def real(tokens: int, seed: int = 0) -> Stream:
    """Keys as models have them: neighbours alike, some channels far from zero; queries follow."""
    stream = Stream.random(tokens, head_dim=32, seed=seed)
    for part in (stream.k, stream.q):
        part[:] = part + 2.0 * part.cumsum(2) / torch.arange(1, tokens + 1).sqrt()[:, None]
    stream.k[..., 3] += 15.0
    stream.k[..., 20] -= 9.0
    return stream


@pytest.mark.parametrize("method", [Quest, TightBound])
def test_it_selects_nearly_the_pages_of_exact_metadata(method: type[Quest]) -> None:
    stream = real(600)
    exact, coarse = (
        decode(stream, lambda m=m: method(metadata=m), [128], prefix=580, page_size=S)
        for m in ("exact", "int8")
    )
    shared = total = 0
    for one, other in zip(exact.steps, coarse.steps, strict=True):
        for head in range(4):
            kept = set(tokens_of(one, 0, head))
            shared += len(kept & set(tokens_of(other, 0, head)))
            total += len(kept)
    assert 0.96 < shared / total < 1.0


def scores_of(run: Run, prefilled: int) -> torch.Tensor:
    """Scores of the last step by codes that are all made now."""
    step = run.steps[-1]
    fresh = Int8Pages([prefilled] * len(step.view.lengths_list))
    return fresh.page_scores(step.view, step.q, 1.0, "per_query", score_open=False)


@pytest.mark.parametrize("prefix", [2, S, 50])
def test_codes_made_as_pages_close_are_those_made_at_once(prefix: int) -> None:
    methods: list[Quest] = []

    def made() -> Quest:
        methods.append(in_int8())
        return methods[-1]

    run = decode(Stream.random(90), made, [1, 8, 12], prefix=prefix, page_size=S)
    view, q = run.steps[-1].view, run.steps[-1].q
    kept = methods[-1]._int8
    assert kept is not None
    grown = kept.page_scores(view, q, 1.0, "per_query", score_open=False)
    assert torch.equal(grown, scores_of(run, prefix))
    exact = view.page_scores(q, 1.0, "per_query")
    closed = exact.isfinite()
    assert torch.equal(grown.isfinite(), closed)
    # The range of one page of the four keys is too narrow for some that follow.
    assert (grown - exact)[closed].abs().max() < 0.2 * exact[closed].abs().max()


def test_rows_of_other_texts_do_not_change_a_row() -> None:
    streams = [Stream.random(60, seed=1), Stream.random(60, seed=2)]
    streams[1].k *= 40.0

    def run(chosen: list[Stream]) -> torch.Tensor:
        group = Group(in_int8(), [12] * len(chosen), 0)
        batch = new_batch(chosen[0].geometry, S, [group], len(chosen), no_rotation)
        steps = []
        for tokens in (slice(0, 50), *(slice(t, t + 1) for t in range(50, 60))):
            q, k, v = (
                torch.stack([getattr(one, part)[0, :, tokens] for one in chosen]) for part in "qkv"
            )
            batch.write(0, k, v, None)
            steps.append(batch.attend(0, q, k, v, 0.25)[:, -1])
        return torch.stack(steps[1:])

    together = run(streams)
    for row, stream in enumerate(streams):
        assert torch.equal(together[:, row], run([stream])[:, 0])


def test_eval_compat_scores_the_open_page_by_its_keys() -> None:
    def method() -> Quest:
        return Quest(variant="eval_compat", metadata="int8")

    run = decode(Stream.random(63), method, [12], prefix=50, page_size=S)
    step = run.steps[-1]
    open_page = (step.view.lengths_list[0] - 1) // S
    pages = Int8Pages([50])
    got = pages.page_scores(step.view, step.q, 1.0, "per_query", score_open=True)
    exact = step.view.page_scores(step.q, 1.0, "per_query", score_open=True)
    assert torch.equal(got[..., open_page], exact[..., open_page])
    assert not torch.equal(got, exact)


SWEEP = ["grid.model=[smollm2]", "grid.task=[passkey]", "grid.method=[quest]", "grid.budget=[64]"]


def test_wrong_choices_and_gpus_are_refused_before_a_worker_starts() -> None:
    with pytest.raises(ValueError, match="quest: metadata='int4': choose one of exact, int8"):
        prepare(composed([*SWEEP, "method.quest.metadata=int4"]))
    chosen = [*SWEEP, "method.quest.metadata=int8", "cluster.device=cuda"]
    with pytest.raises(ValueError, match="method quest: metadata=int8 is scored on the cpu only"):
        prepare(composed(chosen))
    in_int8().check_backend("cpu", "bfloat16", 64)


def test_metadata_is_a_tensor_or_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    run = decode(Stream.random(30), Quest, [8], prefix=28, page_size=S)
    view, q = run.steps[-1].view, run.steps[-1].q
    rest = view.meta.shape[1:]
    codes = torch.zeros(view.meta.shape, dtype=torch.int8)
    good = ops.Int8Metadata(codes, torch.ones(1, *rest), torch.zeros(1, *rest))
    for bad, message in [
        (codes, "page_scores: meta is torch.int8; expected torch.float32, as kv"),
        (good._replace(codes=codes.int()), "meta.codes is torch.int32; expected torch.int8"),
        (good._replace(codes=codes[1:]), r"meta.codes is of shape .*\[N, G, 2, D\]"),
        (good._replace(scale=good.scale[0]), r"meta.scale is of shape .*\[R, G, 2, D\]"),
        (good._replace(offset=good.offset.double()), "meta.offset is torch.float64; expected"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.page_scores(q, view.kv, bad, view.page_table, view.lengths)
