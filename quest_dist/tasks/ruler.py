"""Ruler: what the tasks made to RULER's definitions share (Hsieh et al., arXiv 2404.06654).

A task's text grows by units of filler and is made as large as `length` allows. As in RULER,
`length` holds the whole prompt (chat format, question and the beginning of the answer) and the
tokens to generate; the answer's beginning stands behind the chat format; and the score is the share
of the expected strings that the answer holds. Templates are those of the paper's appendix, as far
as they are wording; the texts are made here. Essays are not used: the filler is the paper's noise.

Invariants
* What a sample hides and where, and its answers, depend on (seed, index) and settings alone; the
  tokenizer decides how much filler stands around it.
* The prompt plus `max_new_tokens` is at most `length`, and one more unit would be too much.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from quest_dist.tasks.fit import largest
from quest_dist.tasks.metrics import string_match_all
from quest_dist.tasks.passkey import FILLER
from quest_dist.tasks.prompt import Language, Protocol
from quest_dist.tasks.task import Outcome, Sample, Task

VERSION = 1
"""Raised when a change in any of these tasks changes any sample."""


@dataclass(frozen=True)
class Exercise:
    """A sample as text: `material`, then `question`, then the answer, which begins with `begun`."""

    material: str
    question: str
    begun: str

    @property
    def body(self) -> str:
        """What the user says."""
        return self.material + self.question

    def after(self, example: Exercise, answer: str) -> Exercise:
        """Return this exercise with another, solved by `answer`, before it."""
        solved = f"{example.body}{example.begun} {answer}\n\n"
        return Exercise(solved + self.material, self.question, self.begun)


class Ruler(Task, ABC):
    """A task of RULER. Subclasses say what is hidden, and the text with so much filler around."""

    metric = "string_match_all"
    family: ClassVar[str]

    def __init__(
        self,
        *,
        seed: int,
        protocol: Mapping[str, Any] | None,
        samples: int,
        length: int,
        max_new_tokens: int,
        chat: bool,
    ) -> None:
        """Check the settings that all tasks have; ValueError names the key and the value."""
        at_least("samples", samples, 1)
        at_least("length", length, 128)
        at_least("max_new_tokens", max_new_tokens, 1)
        if max_new_tokens >= length:
            raise ValueError(f"task.max_new_tokens={max_new_tokens} fills task.length={length}")
        self.seed, self.samples, self.length = seed, samples, length
        self.max_new_tokens, self.chat = max_new_tokens, chat
        self.protocol = Protocol.parse(protocol)

    @abstractmethod
    def hide(self, rng: random.Random, index: int) -> Any:
        """Draw what sample `index` hides: everything but the amount of filler."""

    @abstractmethod
    def write(self, hidden: Any, units: int) -> Exercise:
        """Return the text that hides `hidden` in `units` units of filler."""

    @abstractmethod
    def answers(self, hidden: Any) -> Sequence[str]:
        """Return the strings that a right answer holds."""

    @abstractmethod
    def facts(self, hidden: Any) -> dict[str, Any]:
        """Return what is worth keeping beside the score."""

    def identity(self) -> dict[str, Any]:
        """Return what the samples are made by."""
        return {"source": "generated", "family": self.family, "version": VERSION}

    def count(self) -> int:
        """Return `samples`: there is no end of them."""
        return self.samples

    def needs(self) -> int:
        """Return `length`, which counts the tokens to generate."""
        return self.length

    def sample(self, index: int, language: Language) -> Sample:
        """Build sample `index`, as long as `length` allows; ValueError where nothing fits."""
        chat = self.chat and self.protocol.chat
        language.hold(self.length)
        hidden = self.hide(random.Random(f"{self.family} {self.seed} {index}"), index)

        def tokens(units: int) -> int:
            exercise = self.write(hidden, units)
            return language.length(exercise.body, chat=chat, begun=exercise.begun)

        units = largest(tokens, self.length - self.max_new_tokens, "task.length - max_new_tokens")
        exercise = self.write(hidden, units)
        cut = language.cut(
            exercise.body,
            self.protocol,
            question=len(exercise.material),
            # No code was released for these tasks: the question is what is decoded.
            released="question",
            chat=chat,
            begun=exercise.begun,
            reserve=self.max_new_tokens,
        )
        size = len(cut.context) + len(cut.tail)
        return Sample(
            index=index,
            context=cut.context,
            tail=cut.tail,
            answers=tuple(self.answers(hidden)),
            max_new_tokens=self.max_new_tokens,
            truncated=cut.truncated,
            info={**self.facts(hidden), "units": units, "length": size},
        )

    def score(self, sample: Sample, outcome: Outcome) -> float:
        """Return the share of the answers that the text holds, 0..100."""
        return string_match_all(outcome.text, sample.answers)


def at_least(name: str, value: int, low: int) -> None:
    """Raise ValueError where the setting `name` is below `low`."""
    if value < low:
        raise ValueError(f"task.{name}={value} is below {low}")


def noise(sentences: int) -> list[str]:
    """Return lines of so many filler sentences, five a line; the last line may have fewer."""
    whole, rest = divmod(sentences, len(FILLER))
    return [" ".join(FILLER)] * whole + ([" ".join(FILLER[:rest])] if rest else [])


def scattered(lines: Sequence[str], inserts: Sequence[tuple[float, str]]) -> str:
    """Return `lines` with each insert (depth in 0..1, text) on a line of its own at its depth.

    Inserts of one place keep their order.
    """
    before: list[list[str]] = [[] for _ in range(len(lines) + 1)]
    for depth, text in inserts:
        before[round(depth * len(lines))].append(text)
    parts = before[0]
    for line, behind in zip(lines, before[1:], strict=True):
        parts += [line, *behind]
    return "\n".join(parts)
