"""Latency mode: the accuracy path's tokens and pages, by steps that ask the device nothing."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import no_gpu
import pytest
import torch
from cache_harness import method_spec
from test_engine import TOKENS, point, sample
from tiny_models import tiny, tiny_loaded
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import quest_dist
from quest_dist import engine, latency, ops
from quest_dist.attention import Patch, patch
from quest_dist.batch import Group
from quest_dist.latency import Decoder
from quest_dist.methods.method import Method
from quest_dist.methods.quest import pages_to_keep, pages_to_keep_there
from quest_dist.pool import Pool, Rows

RULES: list[tuple[str, dict[str, object]]] = [
    ("full", {}),
    ("quest", {}),
    ("quest", {"gqa": "max"}),
    ("tightbound", {"gqa": "max"}),
    ("quest", {"gqa": "mean"}),
]
#: Fewer than the context of 60, around it and around its 74 tokens in the end; pages of 4.
BUDGETS = (8, 30, 62, 66, 90)


@contextmanager
def decoding(
    group: Group, tokens: Sequence[int], steps: int, device: str = "cpu", page_size: int = 4
) -> Iterator[Decoder]:
    """A decoder whose rows hold all `tokens` but the last, which it reads next."""
    loaded = tiny_loaded(device=device)
    with torch.inference_mode(), patch(loaded.model, lambda rows: [], page_size) as patched:
        rows = len(group.budgets)
        context = sample(context=tuple(tokens[:-1]))
        prefix = engine.prefill(loaded, patched, context, (), rows)
        decoder = Decoder(patched, prefix.rows.fork(0, rows), group, steps)
        decoder.feed([tokens[-1]] * rows)
        yield decoder


def group_of(name: str, budgets: Sequence[int], **settings: object) -> Group:
    return Group(method_spec(name, **settings).build(), list(budgets), dense_layers=1)


def test_tokens_are_those_of_the_accuracy_path(place: str) -> None:
    loaded = tiny_loaded(device=place)
    points = [
        point(name, None if name == "full" else budget, **settings)
        for budget in BUDGETS
        for name, settings in RULES
        if name != "full" or budget == BUDGETS[0]
    ]
    expected = [result.outcome.token_ids for result in engine.evaluate(loaded, sample(), points)]
    assert latency.generate(loaded, sample(), points) == expected
    assert len(set(expected)) > 4
    stop = expected[1][3]
    ending = tiny_loaded(eos=stop, device=place)
    expected = [result.outcome.token_ids for result in engine.evaluate(ending, sample(), points)]
    assert latency.generate(ending, sample(), points) == expected
    assert len({len(tokens) for tokens in expected}) > 1


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "mistral"])
def test_tokens_are_those_of_patched_generation(kind: str) -> None:
    loaded = tiny_loaded(kind)
    prompt = torch.tensor([TOKENS[:66]])
    with quest_dist.patched(loaded.model, "quest", 16, page_size=4, dense_layers=1):
        out = loaded.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False
        )
    # The prompt's prefill gives the first token; those after it are decoded.
    whole = sample(context=tuple(TOKENS[:66]), tail=(int(out[0, 66]),), max_new_tokens=7)
    assert list(latency.generate(loaded, whole, [point("quest", 16)])[0]) == out[0, 67:].tolist()


def test_pages_to_keep_are_the_same_there_as_here() -> None:
    pairs = [(length, budget) for length in range(1, 70) for budget in range(1, 80)]
    lengths, budgets = torch.tensor(pairs, dtype=torch.int32).T
    for size in (1, 4, 16):
        here = [pages_to_keep(length, budget, size) for length, budget in pairs]
        there = pages_to_keep_there(lengths, budgets, size)
        assert there.dtype == torch.int32
        assert there.tolist() == here


class Asks(TorchDispatchMode):
    """Refuses what would make the host wait for a GPU, and notes the largest tensor made."""

    REFUSED = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select",
               "unique", "_unique2", "bincount", "repeat_interleave", "lift_fresh")  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.own = 0, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op if it may."""
        kwargs = kwargs or {}
        if self.own:
            return func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        assert name not in self.REFUSED, f"{name} reads a value back or brings one from the host"
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        device = kwargs.get("device")
        moved = name == "_to_copy" and device is not None and device != inputs[0].device
        assert not moved, f"{name} moves data to {device}"
        assert name != "copy_" or inputs[0].device == inputs[1].device, "copy_ moves data"
        result = func(*args, **kwargs)
        held = {x.untyped_storage().data_ptr() for x in inputs}
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in held:
                self.largest = max(self.largest, made.untyped_storage().nbytes())
        return result


def by_themselves(asks: Asks, op: Callable[..., Any]) -> Callable[..., Any]:
    """The op with what it does inside left out: a kernel's own tests answer for that."""

    def run(*args: Any, **options: Any) -> Any:
        asks.own = True
        try:
            return op(*args, **options)
        finally:
            asks.own = False

    return run


@pytest.mark.parametrize(("name", "settings"), RULES)
def test_a_step_asks_the_device_for_nothing_and_makes_no_large_tensor(
    name: str, settings: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    budgets = [0, 0, 0] if name == "full" else [8, 30, 90]
    asks = Asks()
    monkeypatch.setattr(ops, "decode", by_themselves(asks, ops.decode))
    with decoding(group_of(name, budgets, **settings), TOKENS, 6) as decoder:
        table, kv = decoder._rows.page_table, decoder.pool.kv
        held = table.clone()
        with asks:
            for _ in range(6):
                decoder.step()
        assert decoder._rows.page_table is table
        assert torch.equal(table, held)
        assert decoder.pool.kv is kv
        assert decoder.lengths.tolist() == [85, 85, 85]
    assert 0 < asks.largest <= 3 * 97 * 4  # the logits of three rows


def test_what_asks_the_device_is_found() -> None:
    values, absent = torch.ones(3), torch.ones(3, device="meta")
    for ask in (lambda: int(values.sum()), lambda: bool(values[0] > 0), values.nonzero,
                lambda: torch.tensor([1, 2]), lambda: values.to("meta")):  # fmt: skip
        with pytest.raises(AssertionError), Asks():
            ask()
    with pytest.raises(NotImplementedError):  # on the CPU no op does it
        absent.tolist()


@pytest.mark.parametrize("name", ["full", "quest"])
def test_a_step_runs_where_there_is_nothing_to_ask(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with no_gpu.installed(monkeypatch) as device, torch.inference_mode():
        model = tiny().to(device)
        with patch(model, lambda rows: [], 4) as patched:
            rows = Rows(Pool(patched.geometry, 4, 60, device), 2)
            rows.extend([40, 50])
            decoder = Decoder(patched, rows, group_of(name, [8, 60]), 20)
            for _ in range(3):
                decoder.step()
            assert decoder.tokens.device == decoder.logits.device == device
            assert decoder.attended[3].device == device


def test_rows_of_several_lengths_decode_together() -> None:
    alone = []
    for tokens in (TOKENS[:41], TOKENS[:61]):
        with decoding(group_of("quest", [16]), tokens, 9) as decoder:
            for _ in range(9):
                decoder.step()
            alone.append(decoder.tokens[0].tolist())
    loaded = tiny_loaded()
    with torch.inference_mode(), patch(loaded.model, lambda rows: [], 4) as patched:
        rows = _ragged(patched, TOKENS[:60], (40, 60))
        decoder = Decoder(patched, rows, group_of("quest", [16, 16]), 9)
        decoder.feed([TOKENS[40], TOKENS[60]])
        for _ in range(9):
            decoder.step()
        assert decoder.tokens.tolist() == alone
        with pytest.raises(ValueError, match="the steps that it was made for are used up"):
            decoder.step()


def _ragged(patched: Patch, tokens: Sequence[int], lengths: Sequence[int]) -> Rows:
    """Rows that hold the first so many tokens, prefilled with padding on the left."""
    groups = [Group(method_spec("full").build(), [0] * len(lengths), 0)]
    patched._fresh_groups = lambda rows: groups
    longest = max(lengths)
    padded = [[0] * (longest - length) + list(tokens[:length]) for length in lengths]
    mask = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    out = patched.model(input_ids=torch.tensor(padded), attention_mask=mask.long(),
                        position_ids=(mask.cumsum(1) - 1).clamp(min=0))  # fmt: skip
    return out.past_key_values.batch.rows


@pytest.mark.parametrize(
    ("name", "settings"),
    [("h2o", {}), ("tova", {}), ("streaming", {}), ("oracle_page", {}),
     ("quest", {"variant": "eval_compat"}), ("quest", {"metadata": "int8"})],
)  # fmt: skip
def test_methods_that_are_no_page_rule_are_refused(name: str, settings: dict[str, object]) -> None:
    method: Method = method_spec(name, **settings).build()
    with pytest.raises(ValueError, match=f"method {type(method).__name__.lower()}: as it is set"):
        latency.page_rule(Group(method, [8], 0))


def test_moving_rotations_and_too_few_steps_are_refused() -> None:
    scaled = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = tiny(rope_parameters=scaled)
    with patch(model, lambda rows: [], 4) as patched:
        rows = Rows(Pool(patched.geometry, 4, 4), 1)
        with pytest.raises(ValueError, match=r"its rotary embedding \(dynamic\) depends"):
            Decoder(patched, rows, group_of("full", [0]), 5)
        with pytest.raises(ValueError, match="steps=0; expected at least 1"):
            Decoder(patched, rows, group_of("full", [0]), 0)


def test_a_decoder_that_is_dropped_frees_its_pages() -> None:
    with decoding(group_of("quest", [16]), TOKENS[:40], 3) as decoder:
        decoder.step()
        pages = weakref.ref(decoder.pool)
    del decoder
    assert pages() is None


def test_only_a_gpu_captures() -> None:
    with (
        decoding(group_of("full", [0]), TOKENS[:20], 2) as decoder,
        pytest.raises(ValueError, match="its rows are on cpu; only a GPU's steps are captured"),
    ):
        decoder.capture()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("name", "settings"), RULES)
def test_a_replayed_step_is_the_step(name: str, settings: dict[str, object]) -> None:
    found = []
    for captured in (False, True):
        group = group_of(name, [0, 0] if name == "full" else [8, 30], **settings)
        with decoding(group, TOKENS[:61], 20, "cuda") as decoder:
            if captured:
                decoder.capture()
            chosen = []
            for _ in range(20):
                decoder.step()
                chosen.append(decoder.tokens[:, 0].tolist())
            found.append((chosen, decoder.lengths.tolist()))
    assert found[0] == found[1]
