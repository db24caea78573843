"""Tasks to RULER's definitions: sizes, what is hidden and where, scores and mistakes."""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter
from itertools import islice

import pytest
from tiny_language import tiny_language

from quest_dist.tasks.common_words import CommonWords
from quest_dist.tasks.niah import NEEDLE, SHORTEST_NEEDLE, Niah
from quest_dist.tasks.passkey import FILLER
from quest_dist.tasks.ruler import noise, scattered
from quest_dist.tasks.task import Outcome
from quest_dist.tasks.variable_tracking import VariableTracking
from quest_dist.tasks.words import WORDS, compounds

FRAME = {"head": "<s>user: ", "foot": "</s><s>assistant:"}
LONG = {"max_length": 200_000}
TASKS = {
    "single": (Niah, {}),
    "multikey": (Niah, {"keys": 4}),
    "multivalue": (Niah, {"values": 4}),
    "multiquery": (Niah, {"keys": 5, "queries": 2, "values": 2}),
    "needles": (Niah, {"haystack": "needles"}),
    "variable_tracking": (VariableTracking, {"chains": 2}),
    "common_words": (CommonWords, {"common_repeats": 6, "other_repeats": 2}),
}


def made(name, **settings):
    cls, own = TASKS[name]
    return cls(**{"length": 2200, **own, **settings})


def whole(language, sample):
    return language.decode(sample.context + sample.tail)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("length", [2200, 4500, 20_000])
@pytest.mark.parametrize("chat", [False, True])
def test_prompt_and_answer_fill_the_length_to_one_unit(name, length, chat):
    language = tiny_language(**LONG, **FRAME)
    task = made(name, length=length, chat=chat)
    for index in (0, 7):
        sample = task.sample(index, language)
        size = len(sample.context) + len(sample.tail)
        assert sample.info["length"] == size
        assert not sample.truncated
        assert size + sample.max_new_tokens <= length
        # One more unit, as the sample would have been written with it, is too much.
        hidden = task.hide(random.Random(f"{task.family} 0 {index}"), index)
        more = task.write(hidden, sample.info["units"] + 1)
        more_size = language.length(more.body, chat=chat, begun=more.begun)
        assert more_size + sample.max_new_tokens > length
        if "noise" in getattr(task, "haystack", "noise") and name != "common_words":
            longest = max(len(language.encode(" " + sentence)) for sentence in FILLER)
            assert more_size - size <= longest + 1


@pytest.mark.parametrize("name", TASKS)
def test_a_sample_depends_on_seed_and_index_alone(name):
    language = tiny_language(**LONG)
    task = made(name)
    samples = [task.sample(index, language) for index in range(12)]
    assert len({s.answers for s in samples}) == len({s.context for s in samples}) == 12
    assert made(name, samples=99).sample(7, language) == samples[7]
    assert made(name, seed=1).sample(7, language).answers != samples[7].answers


@pytest.mark.parametrize("name", TASKS)
def test_a_longer_text_hides_the_same_in_more_filler(name):
    task = made(name)
    other = made(name, length=2600)
    plain, framed = tiny_language(**LONG), tiny_language(**LONG, **FRAME)
    answers = task.sample(3, plain).answers
    assert task.sample(3, framed).answers == answers
    assert other.sample(3, plain).answers == answers
    assert other.sample(3, plain).info["units"] > task.sample(3, plain).info["units"]


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("tail", ["question", "released"])
def test_the_tail_is_the_question_the_chats_end_and_how_the_answer_begins(name, tail):
    language = tiny_language(**LONG, **FRAME)
    task = made(name, protocol={"tail": tail})
    sample = task.sample(2, language)
    said = language.decode(sample.tail)
    assert re.match(r"(What|Question:)", said)
    asked, _, begun = said.partition("assistant:")
    assert asked.endswith((".", "?"))
    assert begun.endswith(("is", "are", "are:"))
    assert begun.startswith(" ")
    unframed = made(name, protocol={"tail": tail, "chat": False}).sample(2, language)
    assert language.decode(unframed.tail) == asked + begun
    assert made(name, chat=False).sample(2, language).tail == unframed.tail
    assert "user" not in whole(language, unframed)


@pytest.mark.parametrize("name", TASKS)
def test_scores_are_the_share_of_the_answers_found(name):
    task = made(name)
    sample = task.sample(0, tiny_language(**LONG))
    text = " and ".join(sample.answers).lower()
    assert task.score(sample, Outcome(text)) == 100.0
    assert task.score(sample, Outcome("none")) == 0.0
    one = task.score(sample, Outcome(f" {sample.answers[-1]}."))
    assert one == pytest.approx(100 / len(sample.answers))


GOLDEN = {
    "single": "e3320de48354",
    "multikey": "3fae619893d8",
    "multivalue": "ada4be5424fa",
    "multiquery": "ff259fcc98b1",
    "needles": "e7cb2abd77f2",
    "variable_tracking": "242ee5f56de9",
    "common_words": "7f7b7bc4c051",
}


@pytest.mark.parametrize("name", TASKS)
def test_samples_are_those_that_were_measured(name):
    """A change here means that every stored result was measured on another text: raise VERSION."""
    text = whole(tiny_language(**LONG), made(name).sample(1, tiny_language(**LONG)))
    assert hashlib.sha256(text.encode()).hexdigest()[:12] == GOLDEN[name]


# --- needles -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["single", "multikey", "multivalue", "multiquery", "needles"])
def test_every_needle_stands_once_and_on_its_own_line(name):
    language = tiny_language(**LONG)
    task = made(name)
    sample = task.sample(4, language)
    lines = whole(language, sample).split("\n")
    needles = [line for line in lines if line.startswith("One of the special")]
    straw = sample.info["units"] if task.haystack == "needles" else 0
    assert len(needles) == len(set(needles)) == task.keys * task.values + straw
    asked = [NEEDLE.format(key=k, value="") for k in sample.info["query"]]
    mine = [n for n in needles if n.startswith(tuple(a.removesuffix(".") for a in asked))]
    assert {re.findall(r"\d{7}", n)[0] for n in mine} == set(sample.answers)
    assert len(mine) == len(sample.answers) == task.queries * task.values
    assert len({re.findall(r"\d{7}", n)[0] for n in needles}) == len(needles)


def test_depths_cycle_and_hold_in_the_text():
    language = tiny_language(**LONG)
    task = Niah(length=4000, keys=3)
    for index in range(12):
        sample = task.sample(index, language)
        assert sample.info["depth"] == pytest.approx((index % 10 + 0.5) / 10)
        text = whole(language, sample)
        needles = _keys_in_draw_order(task, index)
        for depth, needle in zip(sample.info["depths"], needles, strict=True):
            assert text.count(needle) == 1
            assert text.index(needle) / len(text) == pytest.approx(depth, abs=0.05)


def _keys_in_draw_order(task, index):
    hidden = task.hide(random.Random(f"niah {task.seed} {index}"), index)
    return [text for _, text in hidden.placed]


def test_a_question_names_all_keys():
    language = tiny_language(**LONG)
    sample = Niah(length=900, keys=3, queries=3).sample(0, language)
    one, two, three = sample.info["query"]
    said = language.decode(sample.tail)
    assert said.count(f"numbers for {one}, {two}, and {three} mentioned in the provided text") == 2


def test_a_haystack_of_needles_never_runs_out():
    task = Niah(length=20_000, haystack="needles")
    hidden = task.hide(random.Random("niah 0 0"), 0)
    assert len(hidden.straw) == 20_000 // SHORTEST_NEEDLE
    assert task.sample(0, tiny_language(**LONG)).info["units"] < len(hidden.straw)


# --- variable tracking -------------------------------------------------------------------------


@pytest.mark.parametrize(("chains", "hops"), [(1, 4), (3, 2)])
def test_following_the_assignments_finds_the_answers(chains, hops):
    language = tiny_language(**LONG)
    task = VariableTracking(length=3000, chains=chains, hops=hops)
    for index in range(4):
        sample = task.sample(index, language)
        text = whole(language, sample)
        held: dict[str, str] = {}
        for name, source in re.findall(r"^VAR ([A-Z]{5}) = (.+)$", text, re.MULTILINE):
            held[name] = source if source.isdigit() else held[source.removeprefix("VAR ")]
        assert len(held) == chains * (hops + 1)
        value = sample.info["value"]
        assert tuple(name for name in held if held[name] == value) == sample.answers
        assert len(sample.answers) == hops + 1
        assert value in language.decode(sample.tail)
        assert text.count("Memorize and track") == 2
        solved = text[: text.rindex("Memorize and track")]
        assert value not in solved
        shown = re.findall(r"^VAR ([A-Z]{3}) = ", solved, re.MULTILINE)
        assert len(shown) == chains * (hops + 1)
        answer = solved.strip().rpartition("they are: ")[2].split()
        assert set(answer) <= set(shown)
        assert len(answer) == hops + 1


# --- common words ------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [3000, 6000, 30_000])
def test_common_words_are_the_most_common(length):
    language = tiny_language(**LONG)
    task = CommonWords(length=length, common_repeats=8, other_repeats=2)
    for index in range(2):
        sample = task.sample(index, language)
        listed = whole(language, sample).split("\nBelow is a numbered list", 1)[1].split("\n")[1]
        items = re.findall(r"(\d+)\. ([a-z-]+)", listed)
        assert [int(number) for number, _ in items] == list(range(1, len(items) + 1))
        counted = Counter(word for _, word in items)
        assert {w for w, n in counted.items() if n == 8} == set(sample.answers)
        assert len(sample.answers) == 10
        assert Counter(counted.values()) == {8: 10, 2: sample.info["units"]}
        assert ("-" in listed) == (length > 5000)
        shown = whole(language, sample).split("\nBelow is a numbered list", 1)[0]
        assert "list are: 1. " in shown
        assert not set(sample.answers) & set(re.findall(r"[a-z-]+", shown.split("\n")[1]))


def test_the_solved_example_is_small_below_4096_tokens():
    language = tiny_language(**LONG)

    def shown(length):
        task = CommonWords(length=length, common_repeats=6, other_repeats=1)
        text = whole(language, task.sample(0, language))
        words = re.findall(r"\d+\. ([a-z-]+)", text.split("\nQuestion")[0])
        return sorted(Counter(Counter(words).values()).items())

    assert shown(4095) == [(1, 10), (3, 10)]
    assert shown(4096) == [(3, 30), (10, 10)]


# --- parts -------------------------------------------------------------------------------------


def test_no_word_stands_within_another():
    assert len(set(WORDS)) == len(WORDS) > 600
    found = [(a, b) for a in WORDS for b in WORDS if a != b and a in b]
    assert not found


def test_compounds_are_never_twice_the_same():
    found = list(islice(compounds(random.Random(0)), 20_000))
    assert len(set(found)) == len(found)
    assert list(islice(compounds(random.Random(0)), 5)) == found[:5]


def test_inserts_stand_at_their_depths_in_their_order():
    lines = ["a", "b", "c", "d"]
    assert scattered(lines, [(0.5, "X"), (0.5, "Y"), (0.0, "Z"), (1.0, "W")]) == (
        "Z\na\nb\nX\nY\nc\nd\nW"
    )
    assert scattered([], [(0.3, "X")]) == "X"
    assert noise(7) == [" ".join(FILLER), " ".join(FILLER[:2])]
    assert noise(0) == []


@pytest.mark.parametrize(
    ("name", "settings", "match"),
    [
        ("single", {"samples": 0}, "task.samples=0 is below 1"),
        ("single", {"length": 100}, "task.length=100 is below 128"),
        ("single", {"max_new_tokens": 0}, "task.max_new_tokens=0 is below 1"),
        ("single", {"max_new_tokens": 2200}, "task.max_new_tokens=2200 fills task.length=2200"),
        ("single", {"haystack": "essays"}, r"task.haystack='essays'.*needles, noise"),
        ("single", {"keys": 0}, "task.keys=0 is below 1"),
        ("single", {"values": 0}, "task.values=0 is below 1"),
        ("single", {"depths": 0}, "task.depths=0 is below 1"),
        ("multikey", {"queries": 5}, "task.queries=5 is above task.keys=4"),
        ("single", {"protocol": {"tail": "x"}}, "protocol.tail"),
        ("variable_tracking", {"chains": 0}, "task.chains=0 is below 1"),
        ("variable_tracking", {"hops": 0}, "task.hops=0 is below 1"),
        ("common_words", {"common": 0}, "task.common=0 is below 1"),
        ("common_words", {"other_repeats": 0}, "task.other_repeats=0 is below 1"),
        ("common_words", {"common_repeats": 1}, "task.common_repeats=1 must be above"),
    ],
)
def test_mistakes(name, settings, match):
    with pytest.raises(ValueError, match=match) as caught:
        made(name, **settings)
    assert "\n" not in str(caught.value)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"takes 2200 tokens, more than model\.max_length=2000"):
        made("single").sample(0, tiny_language(max_length=2000))
    with pytest.raises(ValueError, match=r"task\.length - max_new_tokens=1080 is less than"):
        CommonWords(length=1200).sample(0, tiny_language(**LONG))
