"""Models with weights in 4 bits: rounding, activation-aware scales, and what does not change."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from test_models import BUNDLED, needs_bundled, settings
from tiny_language import tiny_tokenizer
from tiny_models import KINDS, tiny, tiny_loaded
from torch import Tensor, nn

from quest_dist import artefacts, attention, bundled, engine, int4, linear4, models
from quest_dist.calibrators import awq
from quest_dist.folders import find
from quest_dist.linear4 import Linear4
from quest_dist.plan import Point, Spec
from quest_dist.tasks.task import Sample

GROUP = 32
SIZES = {"hidden_size": 64, "intermediate_size": 96}
#: Text of a thousand tokens and more; encoding all of it takes a second.
CHARACTERS = 8192
TOKENS = torch.randint(0, 97, (2, 48), generator=torch.Generator().manual_seed(3))


def linears(model: nn.Module) -> dict[str, Linear4]:
    return {name: one for name, one in model.named_modules() if isinstance(one, Linear4)}


@torch.no_grad()
def logits(model: nn.Module, tokens: Tensor = TOKENS) -> Tensor:
    return model(tokens).logits


def uneven(kind: str = "llama", **changes: object) -> nn.Module:
    """A model some channels of whose activations are large, as real ones' are."""
    model = tiny(kind, **changes)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in linear4.layers(model):
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight.copy_(torch.rand(64, generator=generator) ** 4 * 10 + 0.05)
    return model


def calibrated(model: nn.Module) -> dict[str, Tensor]:
    loaded = replace(tiny_loaded(), model=model)
    return awq.make(loaded, TOKENS, {"group": GROUP})


@pytest.mark.parametrize("kind", KINDS)
def test_every_projection_is_rounded_and_nothing_else(kind: str) -> None:
    model = tiny(kind)
    before = copy.deepcopy(model)
    linear4.round_to_nearest(model, GROUP)
    assert len(linears(model)) == 4 * 7
    for name, one in linears(model).items():
        old = before.get_submodule(name)
        want = int4.quantise(old.weight, GROUP).widened(GROUP)
        assert torch.equal(int4.widened(one.weight4, torch.float32), want)
        old.weight = nn.Parameter(want)
        assert (one.bias is None) == (old.bias is None)
    assert not [name for name in linears(model) if "lm_head" in name]
    assert torch.allclose(logits(model), logits(before), rtol=1e-4, atol=1e-4)


def test_a_scale_of_one_and_no_clipping_is_rounding_to_the_nearest() -> None:
    model, other = tiny(), tiny()
    found = calibrated(tiny())
    nothing = {
        key: torch.full_like(x, torch.inf) if key.endswith(".most") else torch.ones_like(x)
        for key, x in found.items()
    }
    awq.apply(model, nothing, GROUP)
    linear4.round_to_nearest(other, GROUP)
    for name, one in linears(model).items():
        assert torch.equal(one.packed, linears(other)[name].packed), name


@pytest.mark.parametrize(("kind", "kv_heads"), [*((kind, 2) for kind in KINDS), ("llama", 4)])
def test_scaling_alone_changes_nothing(
    kind: str, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = uneven(kind, num_key_value_heads=kv_heads)
    before = logits(model)
    found = calibrated(model)
    scales = {key: x for key, x in found.items() if not key.endswith(".most")}
    # Grouped queries share v, whose channels are then not those that o takes.
    assert ("0.self_attn.v_proj" in scales) == (kv_heads == 4)
    assert any((x != 1).any() for x in scales.values())
    exact = lambda weight, group: Exact(weight)  # noqa: E731
    monkeypatch.setattr(int4, "quantise", exact)
    monkeypatch.setattr(int4, "pack", lambda exact, group: exact)
    monkeypatch.setattr(linear4, "Linear4", lambda exact, bias: exact.linear(bias))
    awq.apply(model, scales, GROUP)
    assert not torch.equal(model.base_model.layers[0].input_layernorm.weight, torch.ones(64))
    assert torch.allclose(logits(model), before, rtol=1e-3, atol=1e-3)


class Exact:
    """Weights that keep all their bits where 4 were asked for."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def linear(self, bias: Tensor | None) -> nn.Linear:
        made = nn.Linear(*self.weight.shape[::-1], bias=bias is not None)
        made.weight = nn.Parameter(self.weight)
        made.bias = None if bias is None else nn.Parameter(bias)
        return made


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_activation_aware_scales_beat_rounding(kind: str) -> None:
    model = uneven(kind)
    want, found = logits(model), calibrated(model)
    by_rounding, aware = copy.deepcopy(model), copy.deepcopy(model)
    linear4.round_to_nearest(by_rounding, GROUP)
    awq.apply(aware, found, GROUP)
    errors = [float((logits(m) - want).square().mean()) for m in (by_rounding, aware)]
    assert 0 < errors[1] < 0.8 * errors[0]
    again = calibrated(model)
    for name, x in found.items():
        assert torch.equal(again[name], x), name


def test_no_scale_is_worse_than_rounding_for_its_block() -> None:
    generator = torch.Generator().manual_seed(2)
    linear = nn.Linear(64, 48, bias=False)
    linear.weight.data = torch.randn(48, 64, generator=generator)
    x = torch.randn(100, 64, generator=generator) * torch.rand(64, generator=generator) ** 3
    before = linear.weight.data.clone()
    scale = awq.best_scale([linear], x, lambda: linear(x), GROUP)
    assert torch.equal(linear.weight, before)

    def error(weight: Tensor) -> float:
        return float(((weight - before) @ x.T).square().mean())

    rounded = int4.quantise(before, GROUP).widened(GROUP)
    scaled = int4.quantise(before * scale, GROUP).widened(GROUP) / scale
    assert error(scaled) < error(rounded)
    most = awq.best_clip(before, x, GROUP)
    kept = int4.quantise(awq.clipped(before, most.float(), GROUP), GROUP).widened(GROUP)
    assert error(kept) < error(rounded)
    assert (most.isfinite() <= (most <= before.view(48, 2, 32).abs().amax(-1))).all()


def test_a_model_that_scales_do_not_fit_is_refused() -> None:
    model = tiny()

    class Shifted(nn.Module):  # as norms that add one to their weight
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.norm, self.weight = norm, nn.Parameter(norm.weight.data - 1)

        def forward(self, x: Tensor) -> Tensor:
            self.norm.weight.data = self.weight.data + 1
            return self.norm(x)

    for layer in linear4.layers(uneven()):
        layer.input_layernorm = Shifted(layer.input_layernorm)
        model.base_model.layers[0] = layer
    with pytest.raises(ValueError, match="LlamaForCausalLM: scaling changes layer 0 by"):
        calibrated(model)
    with pytest.raises(ValueError, match="Sequential has a layer without self_attn"):
        linear4.round_to_nearest(nn.Sequential(nn.Linear(8, 8)))


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny(vocab_size=600, eos_token_id=1, bos_token_id=0).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_a_format_is_a_setting_and_part_of_the_identity(
    local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundled, "cache_root", lambda: tmp_path)
    monkeypatch.setattr(artefacts, "cache_root", lambda: tmp_path)
    monkeypatch.setattr(awq, "LENGTH", 64)
    found = {name: models.load(settings(local, weight_format=name)) for name in ("rtn4", "awq4")}
    assert all(len(linears(one.model)) == 28 for one in found.values())
    [made] = (tmp_path / "artefacts").glob("awq-*.safetensors")
    assert artefacts.header_of(made)["settings"] == models.AWQ
    full = models.identity(settings(local))
    assert models.identity(settings(local, weight_format="full")) == full
    rounded = models.identity(settings(local, weight_format="rtn4"))
    assert rounded == {**full, "weight_format": "rtn4"}
    aware = models.identity(settings(local, weight_format="awq4"))
    assert made.stem == f"awq-{aware['scales']}"
    recipe = artefacts.recipe("awq", models.AWQ, aware, "text")
    assert recipe["model"]["scales"] == aware["scales"]
    shape = {"layers": 4}
    timed = [
        models.shape_identity(settings(local, shape=shape, weight_format=name))
        for name in ("full", "rtn4")
    ]
    assert timed[1] == {**timed[0], "weight_bits": 4}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"weight_format": "rtn"}, r"model.weight_format='rtn'.*did you mean 'rtn4'"),
        ({"weight_format": "stored4"}, "its config.json has no quantization_config"),
    ],
)
def test_wrong_formats(local: Path, changes: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        models.check(settings(local, **changes))
    with pytest.raises(ValueError, match="stored4': the bundled model is stored in full"):
        models.check({**BUNDLED, "weight_format": "stored4"})


def test_every_method_runs_on_such_weights() -> None:
    """As on any model: what a method attends to is what it promises."""
    loaded = tiny_loaded()
    linear4.round_to_nearest(loaded.model, GROUP)
    sample = Sample(0, tuple(range(3, 60)), (7, 8), (), max_new_tokens=4)
    specs = [
        Spec(name, settings)
        for path in sorted((find("conf") / "method").glob("*.yaml"))
        for name, settings in yaml.safe_load(path.read_text()).items()
    ]
    specs = [spec for spec in specs if artefacts.kind_of(spec) is None]
    assert len(specs) > 6
    points = [point(spec, 32 if spec.budgeted else None) for spec in specs]
    found = list(zip(specs, engine.evaluate(loaded, sample, points), strict=True))
    for spec, one in found:
        assert len(one.outcome.token_ids) == 4, spec.name
        assert one.planned_low - 1 <= one.attended <= one.planned_high + 1, spec.name
    [whole] = [one for spec, one in found if spec.name == "full"]
    assert whole.outcome.token_ids == tuple(greedy(loaded.model, [*sample.context, 7, 8], 4))


def greedy(model: nn.Module, ids: list[int], count: int) -> list[int]:
    for _ in range(count):
        ids = [*ids, int(logits(model, torch.tensor([ids]))[0, -1].argmax())]
    return ids[-count:]


def point(method: Spec, budget: int | None) -> Point:
    spec = Spec("x", {})
    return Point(
        model=spec, task=spec, method=method, data=spec, protocol=spec,
        budget=budget, page_size=16, dense_layers=0, seed=0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def full() -> models.LoadedModel:
    """The bundled model, for tests that do not change it."""
    return models.load(BUNDLED)


@needs_bundled
def test_the_bundled_model_keeps_its_language(full: models.LoadedModel) -> None:
    text = artefacts.bundled_text()[-CHARACTERS:]
    ids = torch.tensor([full.language.encode(text)[-512:]])

    def perplexity(loaded: models.LoadedModel) -> float:
        out = logits(loaded.model, ids)[0, :-1].float()
        return float(nn.functional.cross_entropy(out, ids[0, 1:]).exp())

    want = perplexity(full)
    got = perplexity(models.load({**BUNDLED, "weight_format": "rtn4"}))
    # 135M parameters, stored in 4 bits and blocks of 32 before: it loses far more than a 7B.
    assert want < got < 1.5 * want


@needs_bundled
def test_real_activations_are_kept_better_than_by_rounding(full: models.LoadedModel) -> None:
    """Of the first layers, on text that was not calibrated on."""
    full = replace(full, model=copy.deepcopy(full.model))
    full.model.base_model.layers = full.model.base_model.layers[:2]
    text = artefacts.bundled_text()[:CHARACTERS]
    ids = torch.tensor(full.language.encode(text)[: 3 * 128]).view(3, 128)
    found = awq.make(full, ids[:2], models.AWQ)
    by_rounding, aware = copy.deepcopy(full.model), copy.deepcopy(full.model)
    linear4.round_to_nearest(by_rounding)
    awq.apply(aware, found)
    with torch.no_grad():
        want, *got = (m.base_model(ids[2:])[0].float() for m in (full.model, by_rounding, aware))
    errors = [float((one - want).square().mean()) for one in got]
    assert 0 < errors[1] < 0.9 * errors[0]


@needs_bundled
def test_the_bundled_model_decodes_and_prefills_alike() -> None:
    """One token through the kernel, and all at once through widened weights."""
    loaded = models.load({**BUNDLED, "weight_format": "rtn4", "dtype": "float32"})
    ids = loaded.language.encode("The quick brown fox jumps over the lazy dog. " * 12)
    whole = logits(loaded.model, torch.tensor([ids]))[0, -1].float()
    with attention.patched(loaded.model, method="full") as model, torch.no_grad():
        cache = model(torch.tensor([ids[:-1]])).past_key_values
        last = model(torch.tensor([ids[-1:]]), past_key_values=cache).logits[0, -1].float()
    assert float((last - whole).abs().max()) < 1e-3 * float(whole.std())
