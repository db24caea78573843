"""PG-19: perplexity of long prose, token by token after a prefilled beginning.

With `prefill: 0` every token but the first is decoded, as in the paper's figure; a longer prefill
measures the same positions for the price of the scored tokens alone. Of n books, the first n
samples are the beginnings, the next n the second segments, and so on. Segments start at paragraphs,
at least SPAN characters a token apart, so they practically never overlap.

A point's curve is its running mean by position, at `checkpoints` evenly spaced positions. Position
is the number of tokens that the last counted prediction was made from; up to the budget, then, a
method has attended to everything.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from quest_dist.tasks.prompt import Language, Protocol
from quest_dist.tasks.sources import Source
from quest_dist.tasks.task import Outcome, Sample, Task

SPAN = 6
"""Characters of prose reserved a token: more than English takes in any common vocabulary."""
VERSION = 1


class PG19(Task):
    """Mean negative log-likelihood in nats of `tokens` tokens after `prefill` tokens of a book."""

    metric = "perplexity"
    x = "position (tokens)"

    def __init__(
        self,
        *,
        data: Source,
        seed: int = 0,
        protocol: Mapping[str, Any] | None = None,
        samples: int = 10,
        prefill: int = 3584,
        tokens: int = 512,
        checkpoints: int = 32,
    ) -> None:
        """Check the settings; books are read from `data` at first need."""
        if samples < 1 or tokens < 1 or prefill < 0:
            raise ValueError(
                f"task.samples={samples}, tokens={tokens} must be >= 1 and prefill={prefill} >= 0"
            )
        if checkpoints < 1:
            raise ValueError(f"task.checkpoints={checkpoints}: a curve has at least 1")
        Protocol.parse(protocol)  # refused here if wrong, although perplexity has no question
        self.data, self.samples, self.prefill, self.tokens = data, samples, prefill, tokens
        self.checkpoints = checkpoints
        self._segments: list[tuple[str, str]] | None = None

    def identity(self) -> dict[str, Any]:
        """Return the identity of the books."""
        return {**self.data.identity("pg19"), "version": VERSION}

    def segments(self) -> list[tuple[str, str]]:
        """Return (title, text) of every segment: the first of each book, then the second, ..."""
        if self._segments is None:
            need = SPAN * (max(1, self.prefill) + self.tokens)
            found = []
            for rank, (title, text) in enumerate(self.data.books()):
                start, part = 0, 0
                while len(text) - start >= need:
                    found.append((part, rank, title, text[start : start + 2 * need]))
                    paragraph = text.find("\n\n", start + need)
                    start, part = (paragraph + 2 if paragraph >= 0 else len(text)), part + 1
            if not found:
                raise ValueError(
                    f"no book has the {need} characters that task.prefill={self.prefill} and "
                    f"task.tokens={self.tokens} need"
                )
            self._segments = [(title, text) for _, _, title, text in sorted(found)]
        return self._segments

    def count(self) -> int:
        """Return the number of segments, capped by `samples`."""
        return min(self.samples, len(self.segments()))

    def needs(self) -> int:
        """Return the tokens of a sample.

        One more than is scored: the first token of the tail is predicted by the dense prefill.
        """
        return max(1, self.prefill) + self.tokens + 1

    def sample(self, index: int, language: Language) -> Sample:
        """Cut segment `index` into a prefilled beginning and scored tokens."""
        title, text = self.segments()[index]
        head, size = max(1, self.prefill), self.needs()
        language.hold(size)
        ids = (*language.opening(text), *language.encode(text))[:size]
        if len(ids) < size:
            raise ValueError(
                f"book {title!r} has only {len(ids)} of the {size} tokens that "
                f"task.prefill and task.tokens ask for"
            )
        return Sample(
            index=index,
            context=ids[:head],
            tail=ids[head:],
            answers=(),
            max_new_tokens=0,
            score_tail=True,
            info={"book": title},
        )

    def score(self, sample: Sample, outcome: Outcome) -> float:
        """Return the mean of the tail's negative log-likelihoods, in nats."""
        assert len(outcome.nll) == len(sample.tail) - 1, (len(outcome.nll), len(sample.tail))
        return sum(outcome.nll) / len(outcome.nll)

    def curve(self, sample: Sample, outcome: Outcome) -> tuple[tuple[float, float], ...]:
        """Return (position, mean NLL in nats from the first scored token up to there)."""
        head, total = len(sample.context), len(outcome.nll)
        sums = tuple(itertools.accumulate(outcome.nll))
        asked = (
            round((head + total) * k / self.checkpoints) - head
            for k in range(1, self.checkpoints + 1)
        )
        counts = dict.fromkeys(min(count, total) for count in asked if count >= 1)
        return tuple((float(head + count), sums[count - 1] / count) for count in counts)
