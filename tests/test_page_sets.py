"""Latency mode attends to the pages that the accuracy path selects: on a tiny model, and on a real
prompt in the bundled one.

A prepared decode does not list its pages. Beside each call its selection is made again from the
same query and cache, by the ops that it stands for; that list is compared with the method's, and
the call's output and log sum exp, bit for bit, with attention over the method's own selection. A
page that differs in one layer, row and head moves one of the two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from cache_harness import Step, method_spec, record, tokens_of
from test_engine import sample
from test_latency import BUDGETS, RULES, group_of
from test_models import needs_bundled
from tiny_models import tiny_loaded
from torch import Tensor

from quest_dist import engine, models, ops
from quest_dist.attention import PagedCache, patch
from quest_dist.batch import Group
from quest_dist.latency import Decoder
from quest_dist.models import LoadedModel
from quest_dist.prepared import PreparedDecode
from quest_dist.tasks.passkey import Passkey
from quest_dist.tasks.task import Sample

Decode = Callable[..., ops.Attended]


@dataclass
class Call:
    """One `PreparedDecode`: the pages that its parts select, and what it returned."""

    index: Tensor
    count: Tensor
    result: ops.Attended


def of_accuracy(
    loaded: LoadedModel, prompt: Sample, group: Group, steps: int, page_size: int
) -> tuple[list[Step], list[int]]:
    """What the method selects in `steps` decode steps, and the last tokens chosen."""
    seen, rows = record(group.method), len(group.budgets)
    with torch.inference_mode(), patch(loaded.model, lambda _: [], page_size) as patched:
        prefix = engine.prefill(loaded, patched, prompt, (), rows)
        cache, at = PagedCache(prefix.fork([group])), len(prompt.context)
        tokens = [prompt.tail[0]] * rows
        for number in range(steps):
            logits = engine.forward(loaded, cache, [[token] for token in tokens], at + number)
            tokens = _next(prompt, number, logits.argmax(-1).tolist())
    return seen, tokens


def of_latency(
    loaded: LoadedModel,
    prompt: Sample,
    group: Group,
    steps: int,
    page_size: int,
    monkeypatch: pytest.MonkeyPatch,
    decode: Decode = PreparedDecode.__call__,
) -> tuple[list[Call], list[int]]:
    """The calls of the same steps in latency mode, those of dense layers left out."""
    calls: list[Call] = []

    def watched(step: PreparedDecode, q: Tensor, *new: Tensor) -> ops.Attended:
        result = decode(step, q, *new)
        kept = ops.Attended(*(x if x is None else x.clone() for x in result))
        kv, meta, table, lengths, keep = step.place
        shown = {key: step.rule[key] for key in ("radius_scale", "reduce")}
        pages = (lengths - 1) // kv.shape[3] + 1
        asked = torch.full_like(lengths, -1) if keep is None else keep
        scores = ops.page_scores(q, kv, meta, table, lengths, **shown)
        calls.append(Call(*ops.select_top(scores, pages, asked, force_last=True), kept))
        return result

    rows = len(group.budgets)
    with (
        monkeypatch.context() as patches,
        torch.inference_mode(),
        patch(loaded.model, lambda _: [], page_size) as patched,
    ):
        patches.setattr(PreparedDecode, "__call__", watched)
        prefix = engine.prefill(loaded, patched, prompt, (), rows)
        decoder = Decoder(patched, prefix.rows.fork(0, rows), group, steps)
        tokens = [prompt.tail[0]] * rows
        for number in range(steps):
            decoder.feed(tokens)
            decoder.step()
            tokens = _next(prompt, number, decoder.tokens[:, 0].tolist())
        layers = patched.geometry.layers
    return [c for n, c in enumerate(calls) if n % layers >= group.dense_layers], tokens


def _next(prompt: Sample, number: int, likeliest: list[int]) -> list[int]:
    """The tail is fed, then what was chosen."""
    fed = prompt.tail[number + 1 : number + 2]
    return list(fed) * len(likeliest) if fed else likeliest


def check_equal(steps: Sequence[Step], calls: Sequence[Call]) -> None:
    """Assert that the page sets of both paths are equal, layer by layer."""
    assert len(steps) == len(calls) > 0
    for step, call in zip(steps, calls, strict=True):
        view, size = step.view, step.view.page_size
        assert torch.equal(step.attended.lse, call.result.lse)
        assert torch.equal(step.attended.out, call.result.out)
        for row, length in enumerate(view.lengths_list):
            for head in range(view.heads):
                of = head * call.index.shape[1] // view.heads
                n = int(call.count[row, of])
                listed = range(-(-length // size)) if n < 0 else call.index[row, of, :n].tolist()
                tokens = [t for p in listed for t in range(size * p, min(length, size * (p + 1)))]
                assert tokens == tokens_of(step, row, head)


@pytest.mark.parametrize(("name", "settings"), RULES)
def test_page_sets_are_those_of_the_accuracy_path(
    name: str, settings: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    budgets = [0] * len(BUDGETS) if name == "full" else list(BUDGETS)
    loaded, given = tiny_loaded(), (sample(tail=sample().tail[:1]),)
    groups = [group_of(name, budgets, **settings) for _ in range(2)]
    steps, tokens = of_accuracy(loaded, *given, groups[0], 14, 4)
    calls, same = of_latency(loaded, *given, groups[1], 14, 4, monkeypatch)
    assert len(steps) == 14 * 3
    assert tokens == same
    check_equal(steps, calls)


@needs_bundled
@pytest.mark.parametrize(("name", "gqa"), [("quest", "per_query"), ("tightbound", "max")])
def test_page_sets_are_equal_on_a_passkey_prompt_in_the_bundled_model(
    name: str, gqa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = models.load({"source": "bundled", "chat": "template", "max_length": 8192})
    prompt = Passkey(length=700).sample(4, loaded.language)
    count = len(prompt.tail) + 2
    groups = [Group(method_spec(name, gqa=gqa).build(), [64, 256], 2) for _ in range(2)]
    steps, tokens = of_accuracy(loaded, prompt, groups[0], count, 16)
    calls, same = of_latency(loaded, prompt, groups[1], count, 16, monkeypatch)
    assert len(steps) == count * 28
    assert tokens == same
    check_equal(steps, calls)
    sets = {tuple(tokens_of(step, 0, 0)) for step in steps}
    assert len(sets) > count  # or any selection would do


def test_one_page_that_differs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, prompt = tiny_loaded(), sample(tail=sample().tail[:1])
    steps, _ = of_accuracy(loaded, prompt, group_of("quest", [16]), 3, 4)
    calls, _ = of_latency(loaded, prompt, group_of("quest", [16]), 3, 4, monkeypatch)
    check_equal(steps, calls)
    step = steps[-1]
    index = step.selection.index
    assert index is not None
    pages = set(index[0, 2].tolist())
    other = index.clone()
    other[0, 2, 0] = next(page for page in range(15) if page not in pages)
    changed = replace(step.selection, index=other)
    with torch.inference_mode():
        attended = step.view.attend(step.q, changed, probabilities=True)
    for wrong in (replace(step, selection=changed), replace(step, attended=attended)):
        with pytest.raises(AssertionError):
            check_equal([*steps[:-1], wrong], calls)


def test_a_decode_with_another_rule_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, prompt = tiny_loaded(), sample(tail=sample().tail[:1])
    steps, _ = of_accuracy(loaded, prompt, group_of("quest", [16]), 2, 4)
    real = PreparedDecode.__call__

    def other(step: PreparedDecode, *token: Any) -> ops.Attended:
        return real(PreparedDecode(*step.place, **{**step.rule, "radius_scale": 0.0}), *token)

    calls, _ = of_latency(loaded, prompt, group_of("quest", [16]), 2, 4, monkeypatch, other)
    with pytest.raises(AssertionError):
        check_equal(steps, calls)
