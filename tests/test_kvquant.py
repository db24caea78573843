"""KVQuant: the oracles of its numbers, its rows, its positions, and its bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cache_harness import Run, Stream, decode, method_spec
from nuq_tokens import back_and_forth, blocks_of, stood_for
from tiny_artefacts import artefact_for
from tiny_models import tiny
from torch import Tensor

import quest_dist
from quest_dist import reference
from quest_dist.attention_inputs import turned
from quest_dist.batch import Group, new_batch
from quest_dist.methods import kvquant
from quest_dist.methods.full import Full
from quest_dist.methods.kvquant import KVQuant
from quest_dist.methods.kvquant_blocks import Rules, cache_bytes, outlier_values, value_bounds
from quest_dist.methods.rotation import Rotation
from quest_dist.methods.traffic import CacheShape
from quest_dist.nuq import BITS, Codebook
from quest_dist.pool import Geometry

G, D = 2, 16


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rules(bits: int, centroids: Tensor, k: Tensor, outliers: float = 0.0) -> Rules:
    """Rules whose bounds hold the keys k [n, G, D] but for a share of outliers."""
    ends = torch.tensor([outliers / 2, 1 - outliers / 2])
    lower, upper = torch.quantile(k.flatten(1), ends, dim=0).view(2, G, D)
    book = Codebook(centroids, centroids)
    assert book.bits == bits
    return Rules(lower, upper, book, book, outliers)


def uniform(bits: int) -> Tensor:
    return torch.linspace(-1, 1, 1 << bits)


def turn(x: Tensor, distance: Tensor) -> Tensor:
    """The rotary embedding of a tiny model."""
    return turned(tiny(), x, distance)


# ---- numbers


@pytest.mark.parametrize("bits", BITS)
def test_a_table_that_holds_every_number_is_exact(bits: int) -> None:
    centroids = torch.cat([torch.tensor([-1.0, 1.0]), random((1 << bits) - 2).clamp(-0.9, 0.9)])
    codes = torch.randint(0, 1 << bits, (50, G, D), generator=torch.Generator().manual_seed(3))
    codes[:2], codes[:, 0, :2] = torch.tensor([[[0]], [[1]]]), torch.tensor([0, 1])
    x = centroids[codes]  # every channel and every token spans [-1, 1]
    for found in back_and_forth(x, x, rules(bits, centroids.sort().values, x)):
        assert torch.equal(found, x)


@pytest.mark.parametrize("bits", BITS)
def test_a_uniform_table_without_outliers_rounds_to_nearest(bits: int) -> None:
    x = random(60, G, D).clamp(-2, 2)
    x[:2], x[:, 0, :2] = torch.tensor([[[-2.0]], [[2.0]]]), torch.tensor([-2.0, 2.0])
    step = 4.0 / ((1 << bits) - 1)
    expected = torch.round((x + 2.0) / step) * step - 2.0
    for found in back_and_forth(x, x, rules(bits, uniform(bits), x)):
        assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("outliers", [0.0, 0.1])
@pytest.mark.parametrize("bits", BITS)
def test_errors_stay_within_half_a_gap_and_outliers_have_none(bits: int, outliers: float) -> None:
    k, v = random(80, G, D) * random(1, G, D, seed=1).exp(), random(80, G, D, seed=2)
    centroids = torch.cat([torch.tensor([-1.0, 1.0]), random((1 << bits) - 2, seed=5).clamp(-1, 1)])
    centroids = centroids.sort().values
    how = rules(bits, centroids, k, outliers)
    keys, values = back_and_forth(k, v, how)
    half_gap = float((centroids[1:] - centroids[:-1]).max()) / 2
    beyond = (k < how.lower) | (k > how.upper)
    assert bool(beyond.any()) == (outliers > 0)
    ranges = ((how.upper - how.lower) / 2).expand_as(k)
    error = (keys - k).abs()
    assert bool((error[~beyond] <= half_gap * ranges[~beyond] + 1e-6).all())
    # What a code misses, in fp16.
    assert bool((error[beyond] <= k[beyond].abs() * 2**-11 + 1e-6).all())
    least, most, channels = value_bounds(v.flatten(1), outliers)
    exact = torch.zeros(80, G * D, dtype=torch.bool).scatter_(1, channels, True)
    assert exact.sum(1).tolist() == [sum(outlier_values(G * D, outliers))] * 80
    error = (values - v).abs().flatten(1)
    # fp16 offsets and ranges: 2^-11 of numbers up to 4 on either end.
    assert bool((error <= half_gap * (most - least) / 2 + 4e-3)[~exact].all())
    assert bool((error[exact] <= 4e-3).all())


def test_more_bits_err_less_by_about_half_each() -> None:
    k, v = random(300, G, D), random(300, G, D, seed=2)
    for part in range(2):
        errors = []
        for bits in BITS:
            found = back_and_forth(k, v, rules(bits, uniform(bits), k))[part]
            errors.append(float((found - (k, v)[part]).square().mean().sqrt()))
        ratios = [errors[0] / errors[1], errors[1] / errors[2]]
        assert all(1.8 < ratio < 2.6 for ratio in ratios), ratios


def test_a_token_of_one_value_is_exact_and_finite() -> None:
    v = torch.full((3, G, D), 1.5)
    _, values = back_and_forth(random(3, G, D), v, rules(3, uniform(3), random(3, G, D), 0.01))
    assert torch.equal(values, v)
    k = torch.full((3, G, D), -0.25)
    keys, _ = back_and_forth(k, v, rules(3, uniform(3), k))
    assert torch.equal(keys, k)


def test_a_huge_number_disturbs_nothing_else() -> None:
    k, v = random(40, G, D), random(40, G, D, seed=2)
    how = rules(2, uniform(2), k, 0.1)
    keys, values = back_and_forth(k, v, how)
    huge_k, huge_v = k.clone(), v.clone()
    huge_k[7, 1, 3], huge_v[9, 0, 5] = 1e4, -1e4
    changed_keys, changed_values = back_and_forth(huge_k, huge_v, how)
    for found, exact in ((changed_keys[7, 1, 3], 1e4), (changed_values[9, 0, 5], -1e4)):
        assert float(found) == pytest.approx(exact, rel=2**-11)
    changed_keys[7, 1, 3] = 1e4
    keys[7, 1, 3], changed_values[9], values[9] = 1e4, 0.0, 0.0
    assert torch.equal(changed_keys, keys)  # other channels, other tokens
    assert torch.equal(changed_values, values)  # other tokens


@pytest.mark.parametrize("prefix", [16, 33, 59])
def test_portions_of_tokens_make_no_difference(prefix: int) -> None:
    stream = Stream.random(60)
    whole, grown = (method_in(stream, settled) for settled in (59, prefix))
    for layer in range(stream.geometry.layers):
        one, other = (
            stood_for(method._layers[layer], method._rows.ids[0], 60, D)
            for method in (whole, grown)
        )
        for got, want in zip(one, other, strict=True):
            assert torch.equal(got, want)


def method_in(stream: Stream, prefix: int, **settings: object) -> KVQuant:
    """The method that served the only row of a stream whose first tokens were prefilled."""
    methods: list[KVQuant] = []

    def made() -> KVQuant:
        methods.append(method_spec("kvquant3", **settings).build())
        return methods[-1]

    decode(stream, made, [0], prefix=prefix, rotate=turn)
    return methods[0]


# ---- positions


def test_rotation_is_the_models_own_and_back_undoes_it() -> None:
    x, rotation = random(30, G, D), Rotation()
    there = turn(x, torch.arange(100, 130))
    assert torch.allclose(rotation.back(there, turn, 100), x, atol=1e-5)
    cos, sin = (one[100:130, None] for one in rotation.tables(turn, 130, x))
    first, second = x.chunk(2, dim=-1)
    by_tables = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    assert torch.allclose(by_tables, there, atol=1e-5)


def test_before_rotation_channels_are_easier_than_after() -> None:
    positions = torch.arange(200)
    plain = 0.3 * random(200, G, D) + 3.0 * random(1, G, D, seed=1)
    rotated = turn(plain, positions)
    v, apart, errors = random(200, G, D, seed=2), [], []
    for bits in BITS:
        before, _ = back_and_forth(plain, v, rules(bits, uniform(bits), plain))
        after, _ = back_and_forth(rotated, v, rules(bits, uniform(bits), rotated))
        before = turn(before, positions)
        apart.append(float((before - after).abs().mean()))
        errors.append([float((found - rotated).abs().mean()) for found in (before, after)])
    assert all(before < after / 2 for before, after in errors)
    assert apart[0] > 1.6 * apart[1] > 2.5 * apart[2] > 0


# ---- the method


def run(stream: Stream, *, prefix: int, **settings: object) -> Run:
    spec = method_spec("kvquant4", **settings)
    return decode(stream, spec.build, [0], prefix=prefix, rotate=turn)


def halves(tokens: int, seed: int = 0) -> Stream:
    """A stream that fp16 holds exactly."""
    stream = Stream.random(tokens, seed=seed)
    return Stream(*(part.half().float() for part in (stream.q, stream.k, stream.v)))


@pytest.mark.parametrize("prefix", [1, 30, 37])
def test_all_outliers_or_all_sinks_is_dense(prefix: int) -> None:
    stream = halves(44)
    dense = decode(stream, Full, [0], prefix=prefix, rotate=turn).outputs
    assert torch.allclose(run(stream, prefix=prefix, sinks=44).outputs, dense, atol=1e-5)
    # Turned back, keys are no longer what fp16 holds exactly.
    outliers = run(stream, prefix=prefix, outliers=1.0).outputs
    assert torch.allclose(outliers, dense, atol=3e-3)
    assert not torch.allclose(run(stream, prefix=prefix).outputs, dense, atol=3e-3)


def test_a_wrong_position_would_show() -> None:
    stream = halves(44)
    shifted = decode(stream, lambda: Late(outliers=1.0), [0], prefix=30, rotate=turn).outputs
    dense = decode(stream, Full, [0], prefix=30, rotate=turn).outputs
    assert not torch.allclose(shifted, dense, atol=3e-2)


class Late(KVQuant):
    """Reads every key one position too late."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.artefact = artefact_for(self)
        exact = self._rotation

        class Later(Rotation):
            def back(self, *args: Any) -> Tensor:
                return exact.back(*args)

            def tables(self, rotate: Any, positions: int, like: Tensor) -> Any:
                return tuple(x[1:] for x in exact.tables(rotate, positions + 1, like))

        self._rotation = Later()


def test_a_step_is_attention_over_what_the_codes_stand_for() -> None:
    stream, methods = Stream.random(60), []

    def made() -> KVQuant:
        methods.append(method_spec("kvquant2", sinks=3).build())
        return methods[-1]

    result = decode(stream, made, [0, 0], prefix=50, rotate=turn)
    layer, view = methods[0]._layers[0], result.steps[-1].view
    for row in range(2):
        k, v = stood_for(layer, methods[0]._rows.ids[row], 60, D)
        k = torch.cat([stream.k[0, :, :3].transpose(0, 1), turn(k[3:], torch.arange(3, 60))])
        v = torch.cat([stream.v[0, :, :3].transpose(0, 1), v[3:]])
        kv = torch.stack([k, v], 2).permute(1, 2, 0, 3)[None]  # one page of 60 tokens
        table, lengths = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([60])
        expected = reference.attend(
            result.steps[-1].q[row : row + 1].double(), kv.double(), table, lengths.int()
        )
        assert torch.allclose(result.outputs[-1, row, 0].double(), expected.out[0], atol=1e-5)
    assert view.lengths_list == (60, 60)


def test_rows_of_one_prefix_hold_it_once_and_their_own_tokens_apart() -> None:
    methods: list[KVQuant] = []

    def made() -> KVQuant:
        methods.append(method_spec("kvquant3").build())
        return methods[-1]

    decode(Stream.random(60), made, [0, 0, 0], prefix=39)
    ids = methods[0]._rows.ids
    assert len({tuple(row[:2]) for row in ids}) == 1  # whole blocks of whole pages: 32 tokens
    own = [block for row in ids for block in row[2:]]
    assert len(own) == len(set(own)) == 3 * 2
    assert not set(own) & set(ids[0][:2])
    assert methods[0]._rows.made == 8


@pytest.mark.parametrize("at_once", [1, 128])
def test_rows_of_other_texts_share_nothing(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvquant, "AT_ONCE", at_once)
    streams = [Stream.random(60, seed=1), Stream.random(60, seed=2)]

    def outputs(chosen: list[Stream]) -> Tensor:
        method = method_spec("kvquant3").build()
        group = Group(method, [0] * len(chosen), 0)
        batch = new_batch(chosen[0].geometry, 4, [group], len(chosen), turn)
        steps = []
        for tokens in (slice(0, 50), *(slice(t, t + 1) for t in range(50, 60))):
            q, k, v = (
                torch.stack([getattr(one, part)[0, :, tokens] for one in chosen]) for part in "qkv"
            )
            batch.write(0, k, v, None)
            steps.append(batch.attend(0, q, k, v, 0.25)[:, -1])
        return torch.stack(steps[1:])

    together = outputs(streams)
    for row, stream in enumerate(streams):
        assert torch.equal(together[:, row], outputs([stream])[:, 0])


@pytest.mark.parametrize("outliers", [0.0, 0.01, 0.2])
@pytest.mark.parametrize("bits", BITS)
def test_bytes_are_those_of_the_formula(bits: int, outliers: float) -> None:
    k, v = random(500, 2, 32), random(500, 2, 32, seed=2)
    ends = torch.tensor([outliers / 2, 1 - outliers / 2])
    book = Codebook(uniform(bits), uniform(bits))
    bounds = torch.quantile(k.flatten(1), ends, dim=0).view(2, 2, 32)
    how = Rules(*bounds, book, book, outliers)
    made = blocks_of(k, v, how)
    keys = float(made.counts[:, :2].sum()) / k.numel()
    assert keys == pytest.approx(outliers, abs=0.005)
    assert made.codes.nbytes == 512 * 2 * 64 * bits / 8
    held = made.codes.nbytes + made.norms.nbytes + made.outliers.nbytes + 32 * 5 * 4
    held += how.key_norms.nbytes + 2 * book.meanings.nbytes
    assert held == pytest.approx(cache_bytes(2, 32, bits, keys, 500, 0))


def test_a_whole_run_holds_what_it_says() -> None:
    method, shape = method_in(Stream.random(60), 50), CacheShape(G, D, 4, 4)
    layer = method._layers[0]
    [ids] = method._rows.ids
    outliers = int((layer.starts[ids, -1] - layer.starts[ids, 0]).sum())
    of_keys = int((layer.starts[ids, G] - layer.starts[ids, 0]).sum())
    held = layer.codes[ids].nbytes + layer.norms[ids].nbytes + layer.starts[ids].nbytes
    held += 4 * outliers + layer.key_norms.nbytes + layer.levels.nbytes + shape.token_bytes
    expected = method.bytes_held(shape, 60, 0) + 4 * (of_keys - 0.01 * 59 * G * D)
    assert held == pytest.approx(expected)


def test_the_papers_bits_an_element() -> None:
    """b + 0.32 with 1 % of outliers, where a token has the 4,096 channels of Llama-2-7B, and 0.02
    for norms and starts."""
    for bits in BITS:
        whole = KVQuant(bits=bits).bytes_moved(CacheShape(32, 128, 2, 16), 32768, 0, 32768)
        each = 8 * whole / (32768 * 2 * 32 * 128)
        assert bits + 0.32 < each < bits + 0.35


def test_quantiles_of_a_token_say_how_many_are_outliers() -> None:
    for channels, share in [(192, 0.01), (1024, 0.01), (4096, 0.01), (33, 0.2), (32, 1.0)]:
        x = random(1, channels, seed=channels)[0]
        ends = torch.tensor([share / 2, 1 - share / 2], dtype=torch.float64)
        low, high = torch.quantile(x.double(), ends)
        counted = int((x <= low).sum()), int((x >= high).sum())
        assert outlier_values(channels, share) == counted
    assert outlier_values(33, 1.0) == (16, 17)  # the middle one is not counted twice
    assert outlier_values(192, 0.0) == (0, 0)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"bits": 5}, "bits=5: choose 2, 3 or 4"),
        ({"bits": "3"}, "bits='3': choose 2, 3 or 4"),
        ({"outliers": 1.5}, r"outliers=1\.5: choose a share from 0 to 1"),
        ({"sinks": -1}, "sinks=-1: choose 0 or more"),
        ({"qnorm": "yes"}, "qnorm='yes': choose true or false"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        KVQuant(**settings)  # type: ignore[arg-type]


def test_an_artefact_of_another_shape_is_refused() -> None:
    small = artefact_for(KVQuant(bits=3), Geometry(1, 4, 2, 8, torch.float32))
    tokens = torch.ones(1, 9, dtype=torch.long)
    said = "made for 1 layers of 2 kv heads of 8, but layer 0 has 2 of 16"
    with quest_dist.patched(tiny(), "kvquant3", artefact=small, dense_layers=0) as model:
        cache = model(tokens).past_key_values
        with pytest.raises(ValueError, match=said):
            model(tokens[:, :1], past_key_values=cache)
