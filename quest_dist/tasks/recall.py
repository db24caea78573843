"""Recall: of the tokens that dense attention scores highest, how many does a method select?

It asks over the passkey's prompts: the text is decoded by full attention, and methods are asked in
its shadow (see `quest_dist.recall`), so one number says how good a selection is, whatever the model
makes of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from quest_dist.tasks.passkey import Passkey
from quest_dist.tasks.prompt import Language
from quest_dist.tasks.sources import Source
from quest_dist.tasks.task import Outcome, Sample

VERSION = 1
"""Raised when a change here changes any score."""


class Recall(Passkey):
    """The share, in percent, of each query head's `top` tokens that the selected set holds.

    The other settings are the passkey's, whose prompts these are.
    """

    metric = "recall"
    evaluated_by: ClassVar[str] = "quest_dist.recall:evaluate"
    x: ClassVar[str] = "decode step"

    def __init__(
        self,
        *,
        data: Source | None = None,
        seed: int = 0,
        protocol: Mapping[str, Any] | None = None,
        samples: int = 10,
        length: int = 4096,
        depths: int = 10,
        max_new_tokens: int = 10,
        chat: bool = False,
        top: int = 10,
    ) -> None:
        """Check the settings."""
        super().__init__(
            data=data,
            seed=seed,
            protocol=protocol,
            samples=samples,
            length=length,
            depths=depths,
            max_new_tokens=max_new_tokens,
            chat=chat,
        )
        if not 1 <= top <= length:
            raise ValueError(f"task.top={top}: choose 1 to task.length={length} tokens")
        self.top = top

    def identity(self) -> dict[str, Any]:
        """Return what the prompts are made by, and the version of the measure."""
        return {**super().identity(), "measure": "recall", "measured": VERSION}

    def sample(self, index: int, language: Language) -> Sample:
        """The passkey's prompt of `index`, with how many top tokens count."""
        sample = super().sample(index, language)
        return replace(sample, info={**sample.info, "top": self.top})

    def score(self, sample: Sample, outcome: Outcome) -> float:
        """Return the recall in percent, over query heads, layers and steps."""
        return float(outcome.facts["recall"])
