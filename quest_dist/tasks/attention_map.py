"""Attention map: a token that matters to the last query, and mattered little to those before it.

The prompt of the paper's Figure 2, "A is B. C is D. A is": the answer, "B", is critical to the last
"is" alone. Sample 0 is that prompt; the others have letters drawn by (seed, index). With each comes
a second prompt with other letters, on which the head to look at is chosen, so that what is reported
was not picked by looking at it.
"""

from __future__ import annotations

import random
import string
from collections.abc import Mapping
from typing import Any, ClassVar

from quest_dist.tasks.prompt import Language
from quest_dist.tasks.sources import Source
from quest_dist.tasks.task import Outcome, Sample, Task

VERSION = 1
"""Raised when a change here changes any sample or score."""
NAMES = ("a", "b", "c", "d")


class AttentionMap(Task):
    """The attention, in percent, that the last query of one head pays to the answer.

    `text` has the places {a}, {b}, {c} and {d}, of which {b} is the answer and {d} the other one;
    `layer` and `head` are chosen by the rule of `quest_dist.attention_map` where they are null.
    """

    metric = "attention"
    evaluated_by: ClassVar[str] = "quest_dist.attention_map:evaluate"
    x: ClassVar[str] = "query"

    def __init__(
        self,
        *,
        data: Source | None = None,
        seed: int = 0,
        protocol: Mapping[str, Any] | None = None,
        samples: int = 10,
        text: str = "{a} is {b}. {c} is {d}. {a} is",
        layer: int | None = None,
        head: int | None = None,
    ) -> None:
        """Check the settings; `data` is not read."""
        if samples < 1:
            raise ValueError(f"task.samples={samples} is below 1")
        for name in ("{b}", "{d}"):
            if text.count(name) != 1:
                raise ValueError(f"task.text={text!r}: write {name} once; it is looked for")
        try:
            text.format(**dict.fromkeys(NAMES, "A"))
        except (KeyError, IndexError, ValueError) as error:
            choices = ", ".join(f"{{{name}}}" for name in NAMES)
            raise ValueError(f"task.text={text!r}: its places can be {choices}") from error
        if text.rstrip().endswith(("{b}", "{d}")):
            raise ValueError(f"task.text={text!r}: the last query must come after {{b}} and {{d}}")
        self.seed, self.samples, self.text = seed, samples, text
        self.layer, self.head = layer, head

    def identity(self) -> dict[str, Any]:
        """Return what the prompts are made by."""
        return {"source": "generated", "family": "attention_map", "version": VERSION}

    def count(self) -> int:
        """Return `samples`: there are letters enough."""
        return self.samples

    def needs(self) -> int | None:
        """Return nothing: any model holds a sentence."""
        return None

    def check_method(self, method: Any) -> None:
        """Raise ValueError for a method with a budget or a rounded cache: the map is that of dense
        attention."""
        if method.budgeted or not method.exact:
            raise ValueError("an attention map is that of dense attention; choose full")

    def sample(self, index: int, language: Language) -> Sample:
        """Build the prompt of `index`; `info` holds the places of {b} and {d}, the prompt on which
        the head is chosen, and where a head is asked for."""
        drawn = random.Random(f"attention map {self.seed} {index}")
        letters = drawn.sample(string.ascii_uppercase, 8)
        if index == 0:
            rest = [letter for letter in letters if letter not in "ABCD"]
            letters = [*"ABCD", *rest[:4]]
        ids, critical, other = self._prompt(letters[:4], language)
        again = self._prompt(letters[4:], language)
        return Sample(
            index=index,
            context=ids[:1],
            tail=ids[1:],
            answers=(letters[1],),
            max_new_tokens=0,
            info={
                "critical": critical,
                "other": other,
                "chosen_on": again,
                "asked": (self.layer, self.head),
            },
        )

    def _prompt(self, letters: list[str], language: Language) -> tuple[tuple[int, ...], int, int]:
        """Token ids and the positions of the tokens that hold {b} and {d}."""
        named = dict(zip(NAMES, letters, strict=True))
        text = self.text.format(**named)
        coded = language.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        opening = language.opening(text)
        places = []
        for name in ("{b}", "{d}"):
            at = len(self.text[: self.text.index(name)].format(**named))
            ends = (end > at for _, end in coded["offset_mapping"])
            places.append(len(opening) + next(i for i, after in enumerate(ends) if after))
        return (*opening, *coded["input_ids"]), places[0], places[1]

    def score(self, sample: Sample, outcome: Outcome) -> float:
        """Return the last query's attention to the answer, in percent."""
        return float(outcome.facts["critical_last"])
