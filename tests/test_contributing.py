"""CONTRIBUTING's worked examples are real: each is cut out of the page, built and tried."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from cache_harness import Stream, decode, tokens_of
from tiny_language import tiny_language

from quest_dist.plan import Spec
from quest_dist.tasks.task import Outcome

PAGE = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = {
    file: text
    for text in re.findall(r"```(?:python|yaml)\n(.*?)```", PAGE, re.DOTALL)
    for file in [text.splitlines()[0].removeprefix("# ")]
}


def settings(file: str) -> dict[str, Any]:
    """The one option that a YAML block defines."""
    (value,) = yaml.safe_load(BLOCKS[file]).values()
    return dict(value)


@pytest.fixture
def example(request: pytest.FixtureRequest) -> Iterator[Spec]:
    """The option of a YAML block, whose module exists while the test runs."""
    group, name = request.param
    option = settings(f"conf/{group}/{name}.yaml")
    path = option["_target_"].rpartition(".")[0]
    module = ModuleType(path)
    sys.modules[path] = module
    exec(BLOCKS[path.replace(".", "/") + ".py"], module.__dict__)
    yield Spec(name, option)
    del sys.modules[path]


@pytest.mark.parametrize("example", [("method", "knorm")], indirect=True)
def test_the_method_selects_the_smallest_keys_and_the_new_token(example: Spec) -> None:
    stream, budget = Stream.random(40), 8
    result = decode(stream, example.build, [budget, 64], prefix=39)
    norms = stream.k[0].norm(dim=-1)
    for head in range(4):
        smallest = norms[head // 2, :39].topk(budget - 1, largest=False).indices
        assert tokens_of(result.steps[0], 0, head) == [*sorted(smallest.tolist()), 39]
        assert tokens_of(result.steps[0], 1, head) == list(range(40))
    assert example.build().planned(40, budget, 16, 0) == (budget, budget)


@pytest.mark.parametrize("example", [("task", "lines")], indirect=True)
def test_the_task_asks_for_a_line_that_its_context_holds(example: Spec) -> None:
    task, language = (
        replace(example, settings={**example.settings, "lines": 5}).build(),
        tiny_language(),
    )
    assert task.count() == 10
    sample = task.sample(3, language)
    assert sample == task.sample(3, language)
    tail = language.decode(sample.tail)
    assert f"{tail} {sample.answers[0]}.\n" in language.decode(sample.context)
    assert task.score(sample, Outcome(f" {sample.answers[0]}.")) == 100
    assert task.score(sample, Outcome(" 1")) == 0
    with pytest.raises(ValueError, match="lines=0"):
        replace(example, settings={**example.settings, "lines": 0}).build()


def test_the_model_is_complete() -> None:
    named = {file: settings(file) for file in BLOCKS if file.startswith("conf/model/")}
    assert named
    ours = yaml.safe_load((Path(__file__).parent.parent / "conf/model/qwen25_7b.yaml").read_text())
    for option in named.values():
        assert set(option) <= set(ours["qwen25_7b"])
        assert set(option["shape"]) == set(ours["qwen25_7b"]["shape"])


def test_every_example_is_used() -> None:
    groups = {Path(file).parent.name for file in BLOCKS}
    assert groups == {"methods", "method", "tasks", "task", "model"}
