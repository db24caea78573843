"""What the tasks that measure time share: nothing is read, a sample is a repeat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quest_dist.tasks.prompt import Language, Protocol
from quest_dist.tasks.task import Outcome, Sample, Task


class Timed(Task):
    """A time at one context length. A sample's context says how long, not what."""

    exclusive = True
    needs_weights = False
    counted: str
    """The setting that says how much is counted in a repeat, which samples carry."""

    def __init__(
        self,
        protocol: Mapping[str, Any] | None,
        samples: int,
        context: int,
        amount: int,
        warm_up: int | None,
    ) -> None:
        """Check the settings; a protocol means nothing to a time. `warm_up` None: timing.WARM_UP of
        the device."""
        Protocol.parse(protocol)
        given = {"samples": samples, "context": context, self.counted: amount}
        for name, value in (given | ({} if warm_up is None else {"warm_up": warm_up})).items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        self.samples, self.context, self.amount, self.warm_up = samples, context, amount, warm_up

    def count(self) -> int:
        """Return the number of repeats."""
        return self.samples

    def needs(self) -> int | None:
        """Return None: random weights know no longest context."""
        return None

    def check_method(self, method: Any) -> None:
        """Raise ValueError for a method that cannot decode on the device alone."""
        method.rule_alone()

    def sample(self, index: int, language: Language) -> Sample:
        """Return repeat `index`: a context of so many tokens, whatever they are."""
        return Sample(
            index,
            context=(0,) * self.context,
            tail=(0,),
            answers=(),
            max_new_tokens=0,
            info={self.counted: self.amount, "warm_up": self.warm_up},
        )

    def score(self, sample: Sample, outcome: Outcome) -> float:
        """Return the repeat's median."""
        return outcome.facts[self.metric.rpartition("_")[2]]
