"""AWQ checkpoints as AutoAWQ's gemm version writes them: the same weights, or one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_models import settings
from test_weight_formats import linears, logits
from tiny_language import tiny_tokenizer
from tiny_models import KINDS, tiny
from torch import Tensor, nn

from quest_dist import awq_files, int4, models

GROUP = 32
SAID = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": GROUP,
    "zero_point": True,
    "version": "gemm",
    "modules_to_not_convert": None,
}


def interleaved(codes: Tensor) -> Tensor:
    """Codes [n, outputs] as int32 [n, outputs / 8], in the order that AutoAWQ packs them in."""
    words = torch.zeros(codes.shape[0], codes.shape[1] // 8, dtype=torch.int64)
    for column in range(words.shape[1]):
        for nibble, output in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
            words[:, column] |= codes[:, 8 * column + output].long() << (4 * nibble)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def write(
    folder: Path, kind: str = "llama", said: dict[str, Any] | None = None, **changes: object
) -> nn.Module:
    """A checkpoint of random codes; the model that has its weights in full."""
    model = tiny(kind, vocab_size=600, eos_token_id=1, bos_token_id=0, **changes)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(9)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        outputs, inputs = module.weight.shape
        codes = torch.randint(0, 16, (inputs, outputs), generator=generator)
        zeros = torch.randint(0, 16, (inputs // GROUP, outputs), generator=generator)
        scales = torch.rand(inputs // GROUP, outputs, generator=generator).half() * 0.02 + 1e-3
        del tensors[f"{name}.weight"]
        tensors[f"{name}.qweight"], tensors[f"{name}.qzeros"] = map(interleaved, (codes, zeros))
        tensors[f"{name}.scales"] = scales
        each = [x.repeat_interleave(GROUP, 0) for x in (zeros, scales)]
        module.weight.data = ((codes - each[0]) * each[1].float()).T.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = SAID if said is None else said
    (folder / "config.json").write_text(json.dumps(config))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_is_the_checkpoints(kind: str, tmp_path: Path) -> None:
    model = write(tmp_path, kind, tie_word_embeddings=kind == "qwen3")
    chosen = settings(tmp_path, weight_format="stored4")
    models.check(chosen)
    loaded = models.load(chosen)
    found = linears(loaded.model)
    assert len(found) == 28
    for name, one in found.items():
        want = model.get_submodule(name).weight
        assert torch.equal(int4.widened(one.weight4, torch.float32), want), name
    ids = torch.arange(40)[None]
    assert torch.allclose(logits(loaded.model, ids), logits(model, ids), rtol=1e-4, atol=1e-4)
    half = models.load({**chosen, "dtype": "bfloat16"})
    assert {x.dtype for x in half.model.parameters()} == {torch.bfloat16}
    assert models.identity(chosen)["weight_format"] == "stored4"


def test_a_projection_may_be_stored_in_full(tmp_path: Path) -> None:
    model = write(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    for part in ("qweight", "qzeros", "scales"):
        del tensors[f"{name}.{part}"]
    tensors[f"{name}.weight"] = model.get_submodule(name).weight.data
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = models.load(settings(tmp_path, weight_format="stored4"))
    assert len(linears(loaded.model)) == 27
    ids = torch.arange(20)[None]
    assert torch.allclose(logits(loaded.model, ids), logits(model, ids), rtol=1e-4, atol=1e-4)


def test_a_negative_scale_becomes_a_positive_one() -> None:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 16, (64, 16), generator=generator)
    zeros = torch.randint(0, 16, (2, 16), generator=generator)
    scales = torch.randn(2, 16, generator=generator).half()
    found = awq_files.decoded(interleaved(codes), interleaved(zeros), scales)
    assert (found.scale >= 0).all()
    each = [x.repeat_interleave(32, 0).float() for x in (zeros, scales)]
    want = ((codes - each[0]) * each[1]).T
    assert torch.equal(found.widened(32), want)
    assert torch.equal(int4.unpack(int4.pack(found, 32)).widened(32), want)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": "gemv"}, "quantization_config.version is 'gemv'; only 'gemm' is read"),
        ({"bits": 3}, "quantization_config.bits is 3; only 4"),
        ({"quant_method": "gptq"}, "quantization_config.quant_method is 'gptq'; only 'awq'"),
        ({"zero_point": False}, "quantization_config.zero_point is False; only True"),
        ({"group_size": -1}, "quantization_config.group_size is -1; choose from 32, 64, 128"),
    ],
)
def test_other_quantisations_are_refused(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    write(tmp_path, said=SAID | changes)
    for call in (models.check, models.load):
        with pytest.raises(ValueError, match=r"model.weight_format='stored4'") as refused:
            call(settings(tmp_path, weight_format="stored4"))
        assert said in str(refused.value)
        assert "\n" not in str(refused.value)


def test_a_quantised_checkpoint_is_no_full_one(tmp_path: Path) -> None:
    write(tmp_path)
    for name in ("full", "rtn4", "awq4"):
        with pytest.raises(ValueError, match="quantised already; choose stored4"):
            models.check(settings(tmp_path, weight_format=name))


def without(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name)


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (without(f"{Q}.qzeros"), f"no tensor {Q}.qzeros"),
        (without("model.norm.weight"), "no tensor model.norm.weight"),
        (lambda x: x.update({f"{Q}.qweight": x[f"{Q}.qweight"][:32]}), f"{Q}.qweight holds"),
        (lambda x: x.update({f"{Q}.scales": x[f"{Q}.scales"][:1]}), f"{Q}.scales has 1 groups"),
    ],
)
def test_a_damaged_checkpoint_is_one_line(
    damage: Callable[[dict[str, Tensor]], None], said: str, tmp_path: Path
) -> None:
    write(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    damage(tensors)
    tensors = {name: x.contiguous() for name, x in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="cannot be loaded") as refused:
        models.load(settings(tmp_path, weight_format="stored4"))
    assert said in str(refused.value)
