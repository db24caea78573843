"""The six families of generated records: facts, questions, prompts and plain filler, as data.

Wording is kept so simple that a model of a hundred million parameters can answer with full
attention; what a family tests is whether the facts are still attended to, not whether the model is
clever. `filler` says nothing that a question asks about.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from quest_dist.tasks import words
from quest_dist.tasks.sources import Form


@dataclass(frozen=True)
class Made:
    """The drawn part of one record: facts with their depths (0..1 of the text), question, answers."""

    facts: Sequence[str]
    depths: Sequence[float]
    question: str
    answers: Sequence[str]


def _whole(body: str, made: Made) -> tuple[str, str]:
    return body, made.question


@dataclass(frozen=True)
class Family:
    """One family: how it draws facts, what surrounds them, and how it is asked."""

    form: Form
    filler: Sequence[str]
    make: Callable[[random.Random], Made]
    layout: Callable[[str, Made], tuple[str, str]] = _whole
    """Splits the text into the record's `context` and `input`."""


def depths(rng: random.Random, count: int) -> tuple[float, ...]:
    """Return `count` depths in order, one in each equal part of the text, none at its very start."""
    return tuple((i + 0.1 + 0.8 * rng.random()) / count for i in range(count))


def qasper(rng: random.Random) -> Made:
    """A method section names the corpus."""
    name = words.place_name(rng)
    return Made(
        facts=[f"All experiments of this paper were run on the {name} corpus."],
        depths=depths(rng, 1),
        question="On which corpus were all experiments of this paper run?",
        answers=[f"{name}", f"the {name} corpus"],
    )


def hotpotqa(rng: random.Random) -> Made:
    """Two keepers, one thing each: the answer needs both passages."""
    first, second = rng.sample(words.FIRST_NAMES, 2)
    one, two = words.thing(rng), words.thing(rng)
    return Made(
        facts=[f"{first} owns a {one}.", f"{second} owns a {two}."],
        depths=depths(rng, 2),
        question=f"What do {first} and {second} own?",
        answers=[f"{first} owns a {one} and {second} owns a {two}", f"{one} and {two}"],
    )


def gov_report(rng: random.Random) -> Made:
    """Three findings."""
    a, b, c = (words.place_name(rng) for _ in range(3))
    x, y, z = (words.thing(rng) for _ in range(3))
    facts = [
        f"The first finding is that {a} lost a {x}.",
        f"The second finding is that {b} lost a {y}.",
        f"The third finding is that {c} lost a {z}.",
    ]
    return Made(facts=facts, depths=depths(rng, 3), question="", answers=[" ".join(facts)])


def triviaqa(rng: random.Random) -> Made:
    """A fact after worked examples."""
    name, what = words.place_name(rng), words.creature(rng)
    return Made(
        facts=[f"The flag of {name} shows a {what}."],
        depths=depths(rng, 1),
        question=f"Question:\nWhat does the flag of {name} show?\nAnswer:",
        answers=[what],
    )


_EXAMPLES = "\n\n".join(
    f"Passage:\nThe flag of {place} shows a {what}. It was a quiet day.\n"
    f"Question:\nWhat does the flag of {place} show?\nAnswer:\n{what}"
    for place, what in (("Ostrava", "white unicorn"), ("Belmore", "plain cross"), ("Tivoli", "round sun"))
)


def _shots(body: str, made: Made) -> tuple[str, str]:
    return _EXAMPLES, f"Passage:\n{body}\n{made.question}"


def narrativeqa(rng: random.Random) -> Made:
    """A detail of a story."""
    name, what = rng.choice(words.FIRST_NAMES), words.thing(rng)
    return Made(
        facts=[f"Under the stairs {name} had hidden a {what}."],
        depths=depths(rng, 1),
        question=f"What had {name} hidden under the stairs?",
        answers=[f"a {what}"],
    )


def multifieldqa_en(rng: random.Random) -> Made:
    """An entry of a mixed document."""
    name, place = rng.choice(words.FIRST_NAMES), words.place_name(rng)
    return Made(
        facts=[f"NOTICE: The next meeting with {name} takes place in {place}."],
        depths=depths(rng, 1),
        question=f"Where does the next meeting with {name} take place?",
        answers=[place, f"in {place}"],
    )


FILLER_PAPER = (
    "The method follows earlier work in most respects.",
    "We describe each step in turn.",
    "The results are discussed further below.",
    "Related work has looked at this question before.",
    "The model is trained in the usual way.",
    "This is in line with what we expected.",
    "We leave a closer study to future work.",
    "The two settings differ only slightly.",
    "More details are given in the appendix.",
    "The effect is small but steady.",
)
FILLER_STORY = (
    "The rain fell softly on the roof.",
    "Nobody said a word for a long time.",
    "The fire had burned low.",
    "Outside the wind moved in the trees.",
    "The road went on over the hills.",
    "A dog barked somewhere far away.",
    "The evening came early that day.",
    "They walked on in silence.",
    "The bread was warm and the milk was cold.",
    "In the morning the fog was gone.",
)

FORM = dict(marker="Question:", question="Question:", max_new_tokens=24)

FAMILIES: Mapping[str, Family] = {
    "qasper": Family(
        Form("Article: {context}\n\nQuestion: {input}\n\nAnswer:", **FORM), FILLER_PAPER, qasper
    ),
    "hotpotqa": Family(
        Form("{context}\n\nQuestion: {input}\nAnswer:", **FORM), FILLER_STORY, hotpotqa
    ),
    "gov_report": Family(
        Form("Report:\n{context}\n\nNow, repeat the three findings of the report.\n\nSummary:", "Now,", "Now,", 64), FILLER_PAPER, gov_report
    ),
    "triviaqa": Family(
        Form("{context}\n\n{input}", "Question:", "Question:", 16, chat=False, first_line=True), FILLER_STORY, triviaqa, _shots
    ),
    "narrativeqa": Family(
        Form("Story: {context}\n\nQuestion: {input}\n\nAnswer:", **FORM), FILLER_STORY, narrativeqa
    ),
    "multifieldqa_en": Family(
        Form("{context}\n\nQuestion: {input}\nAnswer:", **FORM), FILLER_PAPER, multifieldqa_en
    ),
}
