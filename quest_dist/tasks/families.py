"""The six families of generated records: facts, questions, prompts and filler, as data.

Wording is so plain that a model of a hundred million parameters can answer with full attention, and
every prompt ends with the beginning of its answer: what a family tests is whether the facts are
still attended to, not whether the model is clever. The examples that show a form are worded unlike
the facts, so that they cannot be mistaken for them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from quest_dist.tasks import filler, words
from quest_dist.tasks.sources import Form


@dataclass(frozen=True)
class Made:
    """The drawn part of one record: facts with their depths (0..1), question and answers."""

    facts: Sequence[str]
    depths: Sequence[float]
    question: str
    answers: Sequence[str]


def whole(paragraphs: Sequence[str], made: Made) -> tuple[str, str]:
    """Return (context, input): all paragraphs, and the question."""
    return "\n".join(paragraphs), made.question


@dataclass(frozen=True)
class Family:
    """One family: how it draws facts, what surrounds them, and how it is asked."""

    form: Form
    filler: Sequence[str]
    make: Callable[[random.Random], Made]
    layout: Callable[[Sequence[str], Made], tuple[str, str]] = whole
    """Makes the record's `context` and `input` of its paragraphs."""


def depths(rng: random.Random, count: int) -> tuple[float, ...]:
    """Return `count` depths in order, one in each equal part of the text."""
    return tuple((i + 0.1 + 0.8 * rng.random()) / count for i in range(count))


def _single(rng: random.Random, question: str, lead: str, answer: str, end: str = ".") -> Made:
    """Return a record of one fact, `lead answer end`, whose answer begins with the lead."""
    return Made([f"{lead} {answer}{end}"], depths(rng, 1), f"{question}\nAnswer: {lead}", [answer])


def qasper(rng: random.Random) -> Made:
    """One fact of an article: the corpus, the authors' town, or the name of the method."""
    name = words.place_name(rng)
    question, lead = rng.choice(
        (
            (
                "On which corpus were all experiments of this paper run?",
                "All experiments of this paper were run on the corpus called",
            ),
            (
                "In which town were all recordings of this paper made?",
                "All recordings of this paper were made in the town of",
            ),
            (
                "What is the new algorithm of this paper called?",
                "The new algorithm of this paper is called",
            ),
        )
    )
    return _single(rng, question, lead, name)


def narrativeqa(rng: random.Random) -> Made:
    """One detail of a story: what somebody hid, bought or lost."""
    name = rng.choice(words.FIRST_NAMES)
    question, lead = rng.choice(
        (
            (f"What had {name} hidden under the stairs?", f"Under the stairs {name} had hidden a"),
            (f"What did {name} buy at the market?", f"At the market {name} had bought a"),
            (f"What did {name} lose in the forest?", f"In the forest {name} had lost a"),
        )
    )
    return _single(rng, question, lead, words.thing(rng))


def multifieldqa_en(rng: random.Random) -> Made:
    """One entry of a mixed document: a place, a thing or an animal."""
    name, place = rng.choice(words.FIRST_NAMES), words.place_name(rng)
    question, lead, answer = rng.choice(
        (
            (
                f"Where does the next meeting with {name} take place?",
                f"The next meeting with {name} takes place in",
                place,
            ),
            (
                f"What is the prize of the {place} race?",
                f"The prize of the {place} race is a",
                words.thing(rng),
            ),
            (
                f"What does the sign of the {place} inn show?",
                f"The sign of the {place} inn shows a",
                words.creature(rng),
            ),
        )
    )
    return _single(rng, question, lead, answer)


def hotpotqa(rng: random.Random) -> Made:
    """Two facts: where somebody was born, and what that village looks like."""
    name, place, what = rng.choice(words.FIRST_NAMES), words.place_name(rng), words.thing(rng)
    lead = f"The baker {name} was born in the village of"
    facts = [f"{lead} {place}.", f"The village of {place} is shaped like a {what}."]
    rng.shuffle(facts)
    return Made(
        facts=facts,
        depths=depths(rng, 2),
        question=f"What is the village shaped like in which the baker {name} was born?\n"
        f"Answer: {lead}",
        answers=[what],
    )


def passages(paragraphs: Sequence[str], made: Made) -> tuple[str, str]:
    """Return (context, input) with the paragraphs dealt to four numbered passages."""
    size = -(-len(paragraphs) // 4)
    parts = [paragraphs[i : i + size] for i in range(0, len(paragraphs), size)]
    texts = [f"Passage {n}:\n" + "\n".join(part) for n, part in enumerate(parts, 1)]
    return "\n\n".join(texts), made.question


def gov_report(rng: random.Random) -> Made:
    """One long finding, over several pages of the cache; the summary is all of it."""
    found = [
        f"{kind}s in {place}"
        for kind, place in zip(words.things(rng, 5), words.place_names(rng, 5), strict=True)
    ]
    text = ", ".join(found)
    lead = "The inspectors of the harbour office were missing"
    return Made([f"{lead} {text}."], depths(rng, 1), "", [text])


def triviaqa(rng: random.Random) -> Made:
    """A fact of a passage, after worked examples on other passages."""
    name, what = words.place_name(rng), words.creature(rng)
    lead = f"The flag of {name} shows a"
    question = f"Question:\nWhat does the flag of {name} show?\nAnswer:\n{lead}"
    return Made([f"{lead} {what}."], depths(rng, 1), question, [what])


EXAMPLES = (
    "Passage:\nIn the tower of Ostrava stands a round clock. It was a quiet day.\n"
    "Question:\nWhat stands in the tower of Ostrava?\n"
    "Answer:\nIn the tower of Ostrava stands a round clock.\n\n"
    "Passage:\nThe gate of Belmore is made of solid oak. The day was long.\n"
    "Question:\nWhat is the gate of Belmore made of?\n"
    "Answer:\nThe gate of Belmore is made of solid oak."
)


def shots(paragraphs: Sequence[str], made: Made) -> tuple[str, str]:
    """Return (context, input): worked examples, and the passage with its question."""
    return EXAMPLES, "Passage:\n" + "\n".join(paragraphs) + "\n" + made.question


def _form(template: str, max_new_tokens: int = 8, after: str = "", *ends: str) -> Form:
    return Form(
        template,
        marker="Question:",
        question="Question:",
        max_new_tokens=max_new_tokens,
        chat=False,
        after=after,
        ends=ends or (".", "\n"),
    )


FAMILIES: Mapping[str, Family] = {
    "qasper": Family(_form("Article: {context}\n\nQuestion: {input}"), filler.ARTICLE, qasper),
    "narrativeqa": Family(
        _form("Story: {context}\n\nQuestion: {input}"), filler.STORY, narrativeqa
    ),
    "multifieldqa_en": Family(
        _form("{context}\n\nQuestion: {input}"), filler.DOCUMENT, multifieldqa_en
    ),
    "hotpotqa": Family(
        _form(
            "The following are given passages.\n{context}\n\n"
            "Question: What is the castle built of in which the painter Tom works?\n"
            "Answer: The painter Tom works in the castle of Oldtown. "
            "The castle of Oldtown is built of plain stone.\n\n"
            "Question: {input}",
            20,
            "is shaped like a",
        ),
        filler.STORY,
        hotpotqa,
        passages,
    ),
    "gov_report": Family(
        Form(
            "Report:\n{context}\n\nNow, write a summary of what was missing.\n\n"
            "Summary: The inspectors of the harbour office were missing",
            marker="Now,",
            question="Now,",
            max_new_tokens=48,
            chat=False,
            ends=(".", "\n"),
        ),
        filler.REPORT,
        gov_report,
    ),
    "triviaqa": Family(_form("{context}\n\n{input}"), filler.STORY, triviaqa, shots),
}
