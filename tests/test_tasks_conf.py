"""Configuration: every model, task, data source and protocol file builds what it names."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from omegaconf import OmegaConf

from quest_dist import compose, models, stats
from quest_dist.folders import find
from quest_dist.plan import Spec
from quest_dist.prepare import prepare
from quest_dist.tasks.generated import Generated
from quest_dist.tasks.prompt import Protocol
from quest_dist.tasks.prompts import FORMS

CONF = Path(find("conf"))
RECORD = {"context": "c", "input": "i", "answers": ["a"]}


def files(group):
    return sorted((CONF / group).glob("*.yaml"))


def read(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def ids(path):
    return path.stem


@pytest.mark.parametrize("path", files("task"), ids=ids)
def test_tasks(path, tmp_path):
    [(name, settings)] = read(path).items()
    assert name == path.stem
    task = Spec(name, settings).build(data=Generated(), seed=0, protocol={"tail": "question"})
    timed = task.metric in stats.TIMES
    assert task.count() == (9 if timed else 10)
    assert task.exclusive is timed
    assert task.metric in {*stats.POINTS, *stats.RATES, *stats.LOWER_IS_BETTER}
    assert json.loads(json.dumps(task.identity())) == task.identity()
    with pytest.raises(ValueError, match="sampels"):
        Spec(name, {**settings, "sampels": 3}).build(data=Generated(), seed=0, protocol={})


def test_there_is_a_file_for_every_task_of_the_paper():
    ruler = {"niah_single", "niah_multikey", "niah_multivalue", "variable_tracking", "common_words"}
    paper = {*FORMS, "passkey", "passkey_long", "pg19", "recall", "attention_map", "sparsity"}
    times = {f"kernels_{size}" for size in ("512", *(f"{2**n}k" for n in range(7)))}
    times |= {f"textgen_{bits}{n}k" for bits in ("", "w4_") for n in (8, 16, 32)}
    more = {f"speculation{kind}" for kind in ("", "_chain", "_lookup", "_tree16")}
    assert {path.stem for path in files("task")} == paper | ruler | times | more


def test_ruler_tasks_have_rulers_own_numbers():
    numbers = {
        "niah_single": {"keys": 1, "values": 1, "queries": 1, "max_new_tokens": 128},
        "niah_multikey": {"keys": 4, "values": 1, "queries": 1, "max_new_tokens": 128},
        "niah_multivalue": {"keys": 1, "values": 4, "queries": 1, "max_new_tokens": 128},
        "variable_tracking": {"chains": 1, "hops": 4, "max_new_tokens": 30},
        "common_words": {
            **{"common": 10, "common_repeats": 30, "other_repeats": 3, "max_new_tokens": 120}
        },
    }
    for name, expected in numbers.items():
        [settings] = read(CONF / "task" / f"{name}.yaml").values()
        assert settings.items() >= {**expected, "length": 4096, "chat": True}.items()


def parameters(shape):
    """The parameters of a Llama (or Qwen2, with `qkv_bias`) of this shape."""
    hidden, queries = shape["hidden"], shape["heads"] * shape["head_dim"]
    keys = shape["kv_heads"] * shape["head_dim"]
    attention = 2 * hidden * queries + 2 * hidden * keys
    attention += queries + 2 * keys if shape["qkv_bias"] else 0
    layer = attention + 3 * hidden * shape["intermediate"] + 2 * hidden
    embedded = shape["vocab"] * hidden * (1 if shape["tied"] else 2)
    return embedded + shape["layers"] * layer + hidden


@pytest.mark.parametrize("path", files("model"), ids=ids)
def test_models(path):
    [(name, settings)] = read(path).items()
    assert name == path.stem
    try:
        models.check(settings)
    except ValueError as error:
        assert "not installed" in str(error)  # noqa: PT017 - only the bundled package may be absent
    shape = settings["shape"]
    assert set(shape) == {
        *("layers", "heads", "kv_heads", "head_dim", "hidden", "intermediate", "vocab"),
        *("rope_theta", "tied", "qkv_bias", "parameters", "max_length"),
    }
    assert shape["parameters"] == parameters(shape)
    assert shape["heads"] % shape["kv_heads"] == 0
    assert shape["heads"] * shape["head_dim"] == shape["hidden"]
    assert settings["max_length"] == shape["max_length"]
    assert settings.get("max_prompt", 0) < settings["max_length"]


@pytest.mark.parametrize("path", files("data"), ids=ids)
def test_data(path, tmp_path):
    settings = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    if path.stem == "files":
        assert settings["root"] == "???"
        (tmp_path / "qasper.jsonl").write_text(json.dumps(RECORD), encoding="utf-8")
        settings["root"] = str(tmp_path)
    source = Spec(path.stem, settings).build()
    if path.stem != "hub":  # the hub would have to be asked
        assert source.identity("qasper")["source"] == path.stem


@pytest.mark.parametrize("path", files("protocol"), ids=ids)
def test_protocols(path):
    settings = read(path)
    assert settings["label"] == path.stem
    Protocol.parse(settings)
    assert settings["dense_layers"] == (0 if path.stem == "kvpress" else 2)


class Odd:
    """Has what a task has, but is none."""

    def __init__(self, data, seed, protocol):
        pass

    def count(self):
        return 1


def test_a_class_that_is_no_task_is_refused(monkeypatch):
    module = ModuleType("quest_dist.tasks.odd")
    module.Odd = Odd
    monkeypatch.setattr(Odd, "__module__", module.__name__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    grid = ("grid.task=[odd]", "grid.model=[smollm2]", "grid.method=[full]")
    config = compose.composed(["+task.odd={_target_: quest_dist.tasks.odd.Odd}", *grid])
    with pytest.raises(ValueError, match=r"^task odd: Odd is no Task of quest_dist"):
        prepare(config)
