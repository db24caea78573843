"""KIVI, and Quest over it: when tokens are packed, who shares them, what that weighs."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from cache_harness import Run, Stream, decode, method_spec
from torch import Tensor

from quest_dist import ops, packing, reference, reference_packed
from quest_dist.compose import composed
from quest_dist.methods.kivi import Kivi
from quest_dist.methods.packed_rows import PackedRows, Packing
from quest_dist.methods.quest import Quest
from quest_dist.methods.quest_packed import QuestPacked
from quest_dist.methods.traffic import CacheShape
from quest_dist.packing import quantised
from quest_dist.prepare import prepare

SHAPE = CacheShape(kv_heads=2, head_dim=64, element_bytes=2, page_size=16)


def rounded(x: Tensor, bits: int, dim: int) -> Tensor:
    codes, scale, minimum = quantised(x, bits, dim)
    return codes * scale.float() + minimum.float()


def simulated(stream: Stream, length: int, bits: int, group: int, residual: int) -> Tensor:
    """KIVI by its words, on dense tensors: attention [H, D] of the token at length - 1."""
    k, v = stream.k[0, :, :length].clone(), stream.v[0, :, :length].clone()
    past = length - 1
    keys, values = past // residual * residual, max(0, past - residual)
    heads, dim = k.shape[0], k.shape[2]
    if keys:
        grouped = k[:, :keys].reshape(heads, -1, group, dim)
        k[:, :keys] = rounded(grouped, bits, 2).view(heads, keys, dim)
    if values:
        grouped = v[:, :values].reshape(heads, values, -1, min(group, dim))
        v[:, :values] = rounded(grouped, bits, 3).view(heads, values, dim)
    q = stream.q[0, :, past].view(heads, -1, dim)
    weights = (q @ k.mT * dim**-0.5).softmax(-1)
    return (weights @ v).view(-1, dim)


@pytest.mark.parametrize("prefix", [1, 31, 32, 33, 100])
@pytest.mark.parametrize("bits", [2, 4])
def test_each_step_is_kivi_in_the_words_of_its_paper(bits: int, prefix: int) -> None:
    group, residual = 16, 32
    stream = Stream.random(140, head_dim=32)
    run = decode(stream, lambda: Kivi(bits, group, residual), [0, 0], prefix=prefix, page_size=4)
    for step, position in enumerate(range(prefix, 140)):
        expected = simulated(stream, position + 1, bits, group, residual)
        for row in (0, 1):
            assert torch.allclose(run.outputs[step, row, 0], expected, atol=2e-5)


@pytest.mark.parametrize("name", ["kivi2", "quest_kivi4"])
def test_nothing_is_packed_before_the_residual_is_full(name: str) -> None:
    stream = Stream.random(34)
    made = method_spec(name, group=16, residual=32).build
    packed = decode(stream, made, [1000], prefix=5, page_size=4)
    dense = decode(stream, method_spec("full").build, [0], prefix=5, page_size=4)
    same = (packed.outputs == dense.outputs).flatten(1).all(1).tolist()
    assert same == [True] * 27 + [False] * 2  # the 33rd token has 32 behind it


def test_the_residual_holds_what_has_not_filled_a_lot_and_the_youngest_values() -> None:
    for residual in (32, 128):
        packing = Packing(4, 32, residual)
        for length in range(1, 3 * residual + 2):
            keys, values = packing.ends(length)
            assert length - keys == length % residual
            assert length - values == min(length, residual)


def rows_of(streams: Sequence[Stream], made: Kivi) -> Tensor:
    """Rows with texts of their own, prefilled to 50 and decoded to the end."""
    from quest_dist.batch import Group, new_batch

    count = len(streams)
    group = Group(made, [0] * count, 0)
    batch = new_batch(streams[0].geometry, 4, [group], count, lambda q, distance: q)
    out = []
    for tokens in (slice(0, 50), *(slice(t, t + 1) for t in range(50, 90))):
        q, k, v = (
            torch.stack([getattr(one, part)[0, :, tokens] for one in streams]) for part in "qkv"
        )
        batch.write(0, k, v, None)
        out.append(batch.attend(0, q, k, v, 0.25)[:, -1])
    return torch.stack(out[1:])


def test_rows_of_other_texts_do_not_change_a_row() -> None:
    streams = [Stream.random(90, seed=1), Stream.random(90, seed=2)]
    together = rows_of(streams, Kivi(4, 16, 16))
    for row, stream in enumerate(streams):
        assert torch.equal(together[:, row], rows_of([stream], Kivi(4, 16, 16))[:, 0])


def test_a_prefix_is_packed_once_and_by_another_row_when_its_packer_leaves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packs: list[int] = []
    real = ops.pack

    def counting(
        packed: packing.Packed, kv: Tensor, table: Tensor, keys: Tensor, values: Tensor
    ) -> None:
        packs.append(int((packed.values - values).clamp(min=0).sum()))
        real(packed, kv, table, keys, values)

    monkeypatch.setattr(ops, "pack", counting)
    stream = Stream.random(100)
    whole = decode(stream, lambda: Kivi(4, 16, 32), [0, 0, 0], prefix=80, page_size=4)
    assert packs[0] == 80 - 32  # not three times as many
    assert packs[1:] == [1] * 19  # the next value of the prefix, which all share
    short = Stream(*(part[:, :, :90] for part in (stream.q, stream.k, stream.v)))
    part = decode(short, lambda: Kivi(4, 16, 32), [0, 0, 0], prefix=80, page_size=4)
    part.batch.keep([1, 2])
    from cache_harness import _forward

    for position in range(90, 100):
        out = _forward(part.batch, stream, position, 1, 0.25, 2)
        assert torch.equal(out, whole.outputs[position - 80][1:])


@pytest.mark.parametrize(("bits", "total"), [(2, 3.0), (4, 5.0), (8, 9.0)])
def test_bytes_are_those_of_the_formula_and_of_the_blocks(bits: int, total: float) -> None:
    method, length = Kivi(bits), 32768 + 1
    elements, full = 2 * 64, 2 * 64 * 2
    keys, values = 32768, 32768 - 128
    moved = elements * (keys + values) * total / 8 + (1 + 129) * full
    assert method.bytes_moved(SHAPE, length, 0, length) == moved
    assert method.bytes_held(SHAPE, 32768, 0) == moved - 2 * full
    block = packing.Layout(bits, 32, 64).bytes
    assert 2 * block == 32 * 2 * elements * total / 8
    # Against all tokens in 16 bits: what the paper's table of traffic says.
    assert moved / (length * SHAPE.token_bytes) == pytest.approx(total / 16, rel=0.02)


def test_quest_over_packed_pages_moves_the_metadata_and_its_share_of_the_cache() -> None:
    exact, packed = Quest(gqa="max"), QuestPacked(gqa="max")
    length, budget = 32768, 1024
    metadata = length // 16 * SHAPE.token_bytes
    full = exact.bytes_moved(SHAPE, length, budget, budget) - metadata
    few = packed.bytes_moved(SHAPE, length, budget, budget) - metadata
    assert 5 / 16 < few / full < 5 / 16 * 1.05 + 16 / budget
    everything = packed.bytes_moved(SHAPE, 200, 1000, 200)
    assert everything == pytest.approx(Kivi().bytes_moved(SHAPE, 200, 0, 200))
    held = packed.bytes_held(SHAPE, length, budget)
    assert held == Kivi().bytes_held(SHAPE, length, 0) + metadata


def test_quest_chooses_by_exact_metadata_and_attends_to_what_the_codes_stand_for() -> None:
    stream = Stream.random(120, head_dim=32)
    settings = {"group": 16, "residual": 16, "bits": 2}
    budgets = [12, 40]
    run = decode(
        stream, method_spec("quest_kivi4", **settings).build, budgets, prefix=100, page_size=4
    )
    exact = decode(stream, method_spec("quest").build, budgets, prefix=100, page_size=4)
    for number, (one, other) in enumerate(zip(run.steps, exact.steps, strict=True)):
        assert torch.equal(one.selection.index, other.selection.index)
        view = one.view
        rows = PackedRows(Packing(2, 16, 16), [length - 1 for length in view.lengths_list])
        packed = rows.packed(view)
        want = reference_packed.attend(
            one.q.double(), view.kv.double(), packed, view.page_table, view.lengths,
            one.selection.index, one.selection.count, "pages", view.scale,
        )  # fmt: skip
        assert torch.allclose(run.outputs[number, :, 0], want.out.float(), atol=1e-5)
    assert not torch.allclose(run.outputs, exact.outputs, atol=1e-3)


def errors(bits: int) -> float:
    """Mean squared error of the attention's output under KIVI."""
    stream = Stream.random(400, head_dim=64, seed=3)
    got = decode(stream, lambda: Kivi(bits, 32, 32), [0], prefix=390, page_size=16).outputs
    want = decode(stream, method_spec("full").build, [0], prefix=390, page_size=16).outputs
    return float((got - want).pow(2).mean())


def test_an_error_falls_with_every_bit() -> None:
    found = [errors(bits) for bits in (2, 3, 4, 8)]
    assert found == sorted(found, reverse=True)
    # A bit more halves the step, a little more than that: 2^b - 1 of them.
    assert 3.5 < found[0] / found[1] < 7
    assert 3.5 < found[1] / found[2] < 7


def test_the_reference_backend_gives_what_the_kernels_give() -> None:
    stream = Stream.random(60, head_dim=32)
    with ops.backend("reference"):
        slow = decode(stream, lambda: Kivi(4, 16, 16), [0], prefix=50, page_size=4)
    fast = decode(stream, lambda: Kivi(4, 16, 16), [0], prefix=50, page_size=4)
    assert torch.allclose(slow.outputs, fast.outputs, atol=1e-5)
    assert reference.accumulator(torch.bfloat16) == torch.float32


SWEEP = ["grid.model=[smollm2]", "grid.task=[passkey]", "grid.budget=[64]"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["method.kivi4.bits=5"], "bits=5: choose one of 2, 3, 4, 8"),
        (["method.kivi4.group=24"], "group=24: choose a multiple of 16"),
        (["method.kivi4.residual=100"], "residual=100: choose a multiple of group=32"),
        (["method.kivi4.residual=0"], "residual=0: choose a multiple of group=32"),
        (["method.kivi4.group=48", "method.kivi4.residual=48"], "a head of 64 channels"),
    ],
)
def test_wrong_settings_are_said_before_a_worker_starts(settings: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=f"kivi4: .*{said}"):
        prepare(composed([*SWEEP, "grid.method=[full,kivi4]", *settings]))


def test_it_runs_as_a_run_of_cache_harness() -> None:
    run: Run = decode(Stream.random(60), method_spec("kivi4").build, [0], prefix=50, page_size=4)
    [measured] = run.batch.measured
    assert measured.attended == measured.planned_low == sum(range(51, 61))
