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
    name = words.place_names(rng, 1)[0]
    return Made(
        facts=[f"All experiments of this paper were run on the corpus called {name}."],
        depths=depths(rng, 1),
        question="On which corpus were all experiments of this paper run?\nAnswer: All experiments of this paper were run on the corpus called",
        answers=[name],
    )


def hotpotqa(rng: random.Random) -> Made:
    """Two hops: a person's town, and what that town has."""
    first = rng.choice(words.FIRST_NAMES)
    here = words.place_names(rng, 1)[0]
    one = words.thing(rng)
    facts = [f"{first} lives in {here}.", f"{here} has a {one}."]
    rng.shuffle(facts)
    return Made(
        facts=facts,
        depths=depths(rng, 2),
        question=f"What does the town of {first} have?\nAnswer: {first} lives in",
        answers=[f"{here}. {here} has a {one}."],
    )


def gov_report(rng: random.Random) -> Made:
    """Three findings."""
    a, b, c = (f"{words.place_names(rng, 1)[0]}, {words.thing(rng)}, {rng.choice(words.FIRST_NAMES)}." for _ in range(3))
    facts = [
        f"Finding one: {a}",
        f"Finding two: {b}",
        f"Finding three: {c}",
    ]
    return Made(facts=facts, depths=depths(rng, 3), question="", answers=[" ".join((a,b,c))])


def triviaqa(rng: random.Random) -> Made:
    """A fact after worked examples."""
    name, what = words.place_names(rng, 1)[0], words.creature(rng)
    return Made(
        facts=[f"The flag of {name} shows a {what}."],
        depths=depths(rng, 1),
        question=f"Question:\nWhat does the flag of {name} show?\nAnswer:\nThe flag of {name} shows a",
        answers=[what],
    )


_EXAMPLES = (
    "Passage:\nIn the tower of Ostrava stands a round clock. It was a quiet day.\nQuestion:\nWhat stands in the tower of Ostrava?\nAnswer:\nIn the tower of Ostrava stands a round clock.\n\n"
    "Passage:\nThe gate of Belmore is made of solid oak. The day was long.\nQuestion:\nWhat is the gate of Belmore made of?\nAnswer:\nThe gate of Belmore is made of solid oak.\n"
)


def _shots(body: str, made: Made) -> tuple[str, str]:
    return _EXAMPLES, f"Passage:\n{body}\n{made.question}"


def narrativeqa(rng: random.Random) -> Made:
    """A detail of a story."""
    name, what = rng.choice(words.FIRST_NAMES), words.thing(rng)
    return Made(
        facts=[f"Under the stairs {name} had hidden a {what}."],
        depths=depths(rng, 1),
        question=f"What had {name} hidden under the stairs?\nAnswer: Under the stairs {name} had hidden a",
        answers=[f"{what}"],
    )


def multifieldqa_en(rng: random.Random) -> Made:
    """An entry of a mixed document."""
    name, place = rng.choice(words.FIRST_NAMES), words.place_names(rng, 1)[0]
    return Made(
        facts=[f"NOTICE: The next meeting with {name} takes place in {place}."],
        depths=depths(rng, 1),
        question=f"Where does the next meeting with {name} take place?\nAnswer: The next meeting with {name} takes place in",
        answers=[place],
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

E = (".", "\n")
FORM = dict(marker="Question:", question="Question:", max_new_tokens=8, chat=False, ends=E)
FAMILIES: Mapping[str, Family] = {
    "qasper": Family(
        Form("Article: {context}\n\nQuestion: {input}", **FORM), FILLER_PAPER, qasper
    ),
    "hotpotqa": Family(
        Form("{context}\n\nQuestion: What does the town of Tom have?\nAnswer: Tom lives in Oldtown. Oldtown has a plain stone.\n\nQuestion: {input}", **FORM|{'max_new_tokens':20,'ends':("\n",)}), FILLER_STORY, hotpotqa
    ),
    "gov_report": Family(
        Form("Summary of another report:\nPoint one: Oldtown, plain stone, Tom.\nPoint two: Newtown, plain stick, Kim.\nPoint three: Midtown, plain shoe, Pat.\n\nReport:\n{context}\n\nNow, repeat the three findings of the report.\n\nSummary:\nFinding one:", "Now,", "Now,", 48, chat=False,ends=("\n\n",)), FILLER_PAPER, gov_report
    ),
    "triviaqa": Family(
        Form("{context}\n\n{input}", "Question:", "Question:", 8, chat=False, ends=E), FILLER_STORY, triviaqa, _shots
    ),
    "narrativeqa": Family(
        Form("Story: {context}\n\nQuestion: {input}", **FORM), FILLER_STORY, narrativeqa
    ),
    "multifieldqa_en": Family(
        Form("{context}\n\nQuestion: {input}", **FORM), FILLER_PAPER, multifieldqa_en
    ),
}
