"""Generated: six families of records made from a seed, in LongBench's record format.

Each family mirrors one LongBench task in what it asks for: a fact of an article, two facts of two
passages, the findings of a report, a fact after worked examples, a detail of a story, an entry of a
mixed document. A record is a few salient sentences in plain filler of the family's own kind, sized
with the model's tokenizer. Answers are invented names and words drawn from long lists, so that they
can be read in the context and nowhere else.

This is not LongBench and its numbers do not compare with LongBench's: whatever is made here says
`generated` in its identity and in every sample.

Invariants
* A record is a function of (family, seed, index, tokens, tokenizer) alone.
* Salient sentences keep clear of the end of the context, so that a recent window never holds them.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator, Sequence
from typing import Any

from quest_dist.tasks.families import FAMILIES, Family, Made
from quest_dist.tasks.fit import largest
from quest_dist.tasks.prompt import unknown
from quest_dist.tasks.sources import Form, Measure, Record, digest

VERSION = 1
"""Raised when a change here or in the families changes any record."""
CLEAR = 400
"""Tokens at the end of a prompt, question included, that hold no salient sentence."""
PARAGRAPH = 6
"""Sentences in a paragraph."""


class Generated:
    """Records made from a seed; each whole prompt has at most `tokens` tokens, and nearly so."""

    def __init__(self, tokens: int = 4096) -> None:
        """Check the size: a prompt needs room for its facts and for text that is clear of them."""
        if not isinstance(tokens, int) or tokens < 2 * CLEAR:
            raise ValueError(
                f"data.tokens={tokens!r} is not a whole number of at least {2 * CLEAR}"
            )
        self.tokens = tokens

    def identity(self, task: str) -> dict[str, Any]:
        """Return the generator's version and size, or the digest of the books."""
        if task == "pg19":
            parts = [part.encode() for book in self.books() for part in book]
            return {"source": "generated", "digest": digest(parts)}
        self._family(task)
        return {"source": "generated", "version": VERSION, "tokens": self.tokens}

    def count(self, task: str) -> None:
        """Return None: there is no end of records."""
        self._family(task)

    def form(self, task: str) -> Form:
        """Return the family's own prompt, made for small models."""
        return self._family(task).form

    def record(self, task: str, index: int, seed: int, measure: Measure) -> Record:
        """Make record `index` of a family, with as many filler sentences as fit."""
        family = self._family(task)
        made = family.make(random.Random(f"{VERSION} {task} {seed} {index}"))

        @functools.cache
        def record(sentences: int) -> Record:
            filler = _filler(family.filler, f"{VERSION} {task} {seed} {index} filler", sentences)
            return self._record(task, index, family, made, filler)

        return record(largest(lambda n: measure(record(n)), self.tokens, "data.tokens"))

    def books(self) -> list[tuple[str, str]]:
        """Return the language reference of the running Python as one book.

        Its text changes with the Python release, which is why identity digests it.
        """
        from pydoc_data.topics import topics

        return [("python language reference", "\n\n".join(topics[name] for name in sorted(topics)))]

    def _family(self, task: str) -> Family:
        if task not in FAMILIES:
            raise unknown("task.dataset", task, FAMILIES)
        return FAMILIES[task]

    def _record(
        self, task: str, index: int, family: Family, made: Made, filler: Sequence[str]
    ) -> Record:
        """Put the facts between filler sentences at their depths and lay the text out."""
        clear = 1 - CLEAR / self.tokens
        places = [round(depth * clear * len(filler)) for depth in made.depths]
        sentences: list[str] = []
        for number in range(len(filler) + 1):
            sentences += [f for f, at in zip(made.facts, places, strict=True) if at == number]
            sentences += filler[number : number + 1]
        paragraphs = [
            " ".join(sentences[i : i + PARAGRAPH]) for i in range(0, len(sentences), PARAGRAPH)
        ]
        context, question = family.layout(paragraphs, made)
        return {
            "context": context,
            "input": question,
            "answers": list(made.answers),
            "length": len(f"{context} {question}".split()),
            "dataset": task,
            "language": "en",
            "all_classes": None,
            "_id": f"generated-{task}-{index}",
            "info": {"source": "generated"},
        }


def _filler(sentences: Sequence[str], seed: str, count: int) -> list[str]:
    """Return `count` filler sentences, in shuffled rounds; a larger count only adds some."""
    return [sentence for sentence, _ in zip(_rounds(sentences, seed), range(count), strict=False)]


def _rounds(sentences: Sequence[str], seed: str) -> Iterator[str]:
    rng = random.Random(seed)
    while True:
        yield from rng.sample(sentences, len(sentences))
