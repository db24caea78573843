"""Generated records: sized, stable, answerable from their facts and from nothing near the end."""

from __future__ import annotations

import hashlib
import json

import pytest
from tiny_language import tiny_language

from quest_dist.tasks.families import FAMILIES
from quest_dist.tasks.fit import largest
from quest_dist.tasks.generated import CLEAR, Generated
from quest_dist.tasks.longbench import LongBench
from quest_dist.tasks.prompts import FORMS
from quest_dist.tasks.sources import checked
from quest_dist.tasks.task import Outcome

SIZE = 1500


def task(name, seed=0):
    metric = "rouge_l" if name == "gov_report" else "f1"
    return LongBench(data=Generated(SIZE), dataset=name, metric=metric, seed=seed)


def record(name, index, seed=0):
    return Generated(SIZE).record(name, index, seed, lambda r: len(r["context"] + r["input"]) // 4)


def test_every_task_has_a_family():
    assert set(FAMILIES) == set(FORMS)


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_have_their_size_and_keep_the_answer_clear_of_the_end(name):
    language = tiny_language(max_length=4096)
    for index in range(4):
        sample = task(name).sample(index, language)
        ids = sample.context + sample.tail
        assert SIZE - 30 < len(ids) <= SIZE
        assert not sample.truncated
        assert sample.info["source"] == "generated"
        ending = language.decode(ids[-(CLEAR - 60) :])
        beginning = language.decode(ids[: -(CLEAR - 60)])
        for answer in sample.answers:
            assert answer in beginning
            assert answer not in ending
        assert 1 < len(sample.tail) < 120


@pytest.mark.parametrize("name", FAMILIES)
def test_the_right_continuation_scores_full_marks_and_none_scores_nothing(name):
    built = task(name)
    sample = built.sample(0, tiny_language(max_length=4096))
    [answer] = sample.answers
    said = (
        f" Oldtown. The village of Oldtown is shaped like a {answer}."
        if name == "hotpotqa"
        else answer
    )
    assert built.score(sample, Outcome(said)) == pytest.approx(100.0)
    assert built.score(sample, Outcome(f"\n {said}\n\nQuestion: and")) > 80
    assert built.score(sample, Outcome("")) == 0.0
    assert built.score(sample, Outcome("Oldtown plain stone")) == 0.0


def test_the_answer_of_two_hops_is_in_no_single_sentence_with_the_person():
    for index in range(5):
        made = record("hotpotqa", index)
        name = made["input"].split(" was born?")[0].split()[-1]
        sentences = [s for s in made["context"].replace("\n", " ").split(".") if name in s]
        assert len(sentences) == 1
        assert made["answers"][0] not in sentences[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_records_follow_the_format_and_differ_by_index_and_seed(name):
    records = [record(name, 0), record(name, 1), record(name, 0, seed=1)]
    for made in records:
        checked(made, name)
        assert made["_id"].startswith(f"generated-{name}-")
    assert len({made["context"] + made["input"] for made in records}) == 3
    assert record(name, 1) == records[1]


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_are_hardly_ever_repeated(name):
    answers = [tuple(record(name, index)["answers"]) for index in range(40)]
    assert len(set(answers)) >= 38


def test_records_are_stable():
    """Golden: a change here needs a higher VERSION, or old and new results would be mixed."""
    texts = [json.dumps(record(name, 3), sort_keys=True) for name in sorted(FAMILIES)]
    assert hashlib.sha256("".join(texts).encode()).hexdigest()[:12] == "fa430ed06b37"


def test_identity_and_mistakes():
    data = Generated(2048)
    assert data.identity("qasper") == {"source": "generated", "version": 1, "tokens": 2048}
    assert data.count("qasper") is None
    with pytest.raises(ValueError, match=r"'qaspr'.*did you mean 'qasper'"):
        data.identity("qaspr")
    for tokens in (10, 4096.5, "4096"):
        with pytest.raises(ValueError, match=r"data\.tokens="):
            Generated(tokens)


def test_the_book_is_the_running_pythons_language_reference():
    [(title, text)] = Generated().books()
    assert title == "python language reference"
    assert len(text) > 200_000
    assert len(Generated().identity("pg19")["digest"]) == 16


@pytest.mark.parametrize("slope", [1, 3, 17])
@pytest.mark.parametrize("limit", [5, 6, 50, 1000, 12345])
def test_largest(slope, limit):
    calls = []

    def tokens(n):
        calls.append(n)
        return 5 + slope * n

    assert largest(tokens, limit, "k") == (limit - 5) // slope
    assert len(calls) < 30
    with pytest.raises(ValueError, match="k=4 is less than the 5 tokens"):
        largest(tokens, 4, "k")


def test_largest_of_an_uneven_function():
    def tokens(n):
        return n + 7 * (n // 13) + 90 * (n > 400)

    for limit in range(0, 1200, 37):
        found = largest(tokens, limit, "k")
        assert tokens(found) <= limit < tokens(found + 1)
