"""Attention maps: what they hold, which head is shown, and what the figure claims of it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import synthetic_sweep as synthetic
import torch
from cache_harness import method_spec
from test_engine import TOKENS, point
from tiny_language import tiny_language
from tiny_models import tiny_loaded

from quest_dist import attention_map, figures
from quest_dist.figures import fig02
from quest_dist.table import Row
from quest_dist.tasks.attention_map import AttentionMap
from quest_dist.tasks.task import Sample

TEXT = tuple(TOKENS[:9])
AGAIN = (tuple(TOKENS[20:29]), 3, 5)


def given(**changes: object) -> Sample:
    info = {"critical": 2, "other": 5, "chosen_on": AGAIN, "asked": (None, None), **changes}
    return Sample(0, TEXT[:1], TEXT[1:], ("w1",), 0, info=info)


def test_a_map_is_the_models_own_attention(place: str) -> None:
    loaded = tiny_loaded(device=place)
    found, counted = attention_map.maps(loaded, TEXT, 4)
    loaded.model.set_attn_implementation("eager")
    with torch.inference_mode():
        own = loaded.model(torch.tensor([TEXT], device=place), output_attentions=True).attentions
    assert torch.allclose(found, torch.stack([layer[0].cpu() for layer in own]), atol=1e-4)
    assert (counted.steps, counted.attended) == (9, sum(range(1, 10)))


def test_the_head_is_the_one_of_largest_gap_or_the_one_asked_for() -> None:
    found = torch.zeros(2, 3, 4, 4)
    found[1, 2, 1:, 1] = torch.tensor([0.0, 0.1, 0.9])
    found[0, 1, 1:, 1] = torch.tensor([0.5, 0.7, 0.95])  # more, but always
    assert attention_map.chosen(found, 1, (None, None)) == (1, 2)
    assert attention_map.chosen(found, 1, (0, None)) == (0, 1)
    assert attention_map.chosen(found, 1, (None, 1)) == (0, 1)
    assert attention_map.chosen(found, 1, (1, 0)) == (1, 0)
    with pytest.raises(ValueError, match=r"task.head=3: the model has 0..2, or null"):
        attention_map.chosen(found, 1, (0, 3))


def test_what_is_measured_is_of_the_head_chosen_on_the_other_text(place: str) -> None:
    loaded = tiny_loaded(device=place)
    other, at, _ = AGAIN
    layer, head = attention_map.chosen(attention_map.maps(loaded, other, 4)[0], at, (None, None))
    [result] = attention_map.evaluate(loaded, given(), [point("full")])
    paid = 100 * attention_map.maps(loaded, TEXT, 4)[0][layer, head, :, 2]
    outcome = result.outcome
    assert outcome.facts["critical_last"] == pytest.approx(float(paid[-1]))
    assert outcome.facts["critical_before"] == pytest.approx(float(paid[2:-1].mean()))
    assert outcome.facts["critical_largest"] == pytest.approx(float(paid[2:-1].max()))
    assert dict(outcome.curve) == pytest.approx({float(i): float(paid[i]) for i in range(2, 9)})
    assert outcome.notes == {"head": f"layer {layer} head {head}"}
    drawing = json.loads(json.dumps(outcome.drawing))
    assert drawing["tokens"] == [f"w{token}" for token in TEXT]
    assert [sum(row) for row in drawing["matrix"]] == pytest.approx([100] * 9, abs=0.01)
    assert result.attended == result.planned_low == result.planned_high == 5
    assert AttentionMap().score(given(), outcome) == outcome.facts["critical_last"]


def test_the_task_writes_the_papers_prompt_first_and_knows_its_places() -> None:
    language, task = tiny_language(), AttentionMap()
    made = task.sample(0, language)
    ids = (*made.context, *made.tail)
    assert language.decode(ids) == "A is B. C is D. A is"
    assert "B" in language.decode([ids[made.info["critical"]]])
    assert "D" in language.decode([ids[made.info["other"]]])
    texts = {
        language.decode(s.context + s.tail) for s in (task.sample(i, language) for i in range(9))
    }
    assert len(texts) == 9
    chosen_on = language.decode(made.info["chosen_on"][0])
    assert not set(chosen_on) & set("ABCD")
    assert task.sample(3, language) == AttentionMap(samples=99).sample(3, language)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text": "{a} is."}, r"write \{b\} once"),
        ({"text": "{b} {d} {e} is"}, r"its places can be \{a\}, \{b\}, \{c\}, \{d\}"),
        ({"text": "{d} is {b}"}, "the last query must come after"),
        ({"samples": 0}, "task.samples=0 is below 1"),
    ],
)
def test_texts_without_their_places_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionMap(**settings)


def test_only_dense_attention_has_a_map() -> None:
    AttentionMap().check_method(method_spec("full").build())
    for other in ("quest", "kvquant4"):
        with pytest.raises(ValueError, match="choose full"):
            AttentionMap().check_method(method_spec(other).build())


def row(tmp_path: Path, score: float, low: float, **facts: float) -> Row:
    """A finished row of the figure with these facts and a map of three tokens."""
    made = synthetic.points(["attention_map"], ("full",))
    [found] = synthetic.sweep(tmp_path, made, 3)
    details = {
        "facts": {"critical_before": 5.0, "critical_largest": 20.0, "other_last": 9.0, **facts},
        "curve": [[1, 5.0, 2.0, 8.0, 3], [2, score, low, 90.0, 3]],
        "notes": {"head": ["layer 1 head 2"]},
        "drawing": {"tokens": ["A", "B", "is"], "matrix": [[100, 0, 0], [60, 40, 0], [9, 31, 60]],
                    "layer": 1, "head": 2, "critical": 1, "other": 0},
    }  # fmt: skip
    return replace(found, score=score, low=low, high=90.0, details=json.dumps(details))


def test_the_claim_needs_all_its_parts(tmp_path: Path) -> None:
    made = row(tmp_path, 50.0, 30.0)
    assert fig02.verdict(made).verdict == "reproduced"
    assert "4 times the mean of earlier queries (5.0 %)" in fig02.verdict(made).reason
    for name, value in [("critical_before", 8.0), ("critical_largest", 31.0), ("other_last", 31.0)]:
        other = row(tmp_path / name, 50.0, 30.0, **{name: value})
        assert fig02.verdict(other).verdict == "within interval"
    assert fig02.verdict(replace(made, high=19.0, low=9.0)).verdict == "differs"
    assert fig02.verdict(replace(made, low=math.nan)).verdict == "not comparable"
    assert fig02.verdict(replace(made, n=0)).verdict == "not run"
    both = figures.verdicts("fig02", [made, replace(made, high=19.0, low=9.0)])
    assert both["fig02"].verdict == "differs"
    assert figures.verdicts("fig02", [])["fig02"].verdict == "not run"


def test_the_picture_holds_map_and_means(tmp_path: Path) -> None:
    made = row(tmp_path, 50.0, 30.0)
    *_, data = figures.draw("fig02", [made], tmp_path / "out")
    lines = data.read_text().splitlines()
    assert len(lines) == 1 + 1 + (1 + 2 + 3) + 2
    assert sum(line.startswith("map,") for line in lines) == 6
    assert sum(line.startswith("mean,") for line in lines) == 2
