"""Sample, Outcome and Task: what an evaluation hands to the engine, and what it gets back.

A task turns a data source into samples of token ids and decoded text into a score. It never sees
a model: this module and everything beside it imports neither torch nor transformers, so a plan can
be checked, and a score recomputed, on a machine that has no such library at all.

Invariants
* `Sample.context + Sample.tail` is exactly the token ids of one prompt: the two parts are cut out
  of the ids of the whole prompt and never tokenised apart.
* `Sample.tail` holds at least one token, so at least one decode step sees the method under test.
* `Task.sample` depends on its arguments and the task's settings alone: an index gives the same
  sample in every process, in any order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from quest_dist.tasks.prompt import Language


@dataclass(frozen=True)
class Sample:
    """One prompt, split where decoding starts, with what counts as a right answer."""

    index: int
    context: tuple[int, ...]
    """Token ids that are prefilled densely (BOS and the head of the chat format included)."""
    tail: tuple[int, ...]
    """Token ids decoded one by one, teacher forced (question and end of the chat format)."""
    answers: tuple[str, ...]
    max_new_tokens: int
    """Tokens to generate after the tail; 0 for perplexity."""
    score_tail: bool = False
    """True: the negative log-likelihood of the tail's own tokens is the result (perplexity)."""
    truncated: bool = False
    """True: the prompt was cut to the model's limit by the protocol's rule."""
    info: Mapping[str, Any] = field(default_factory=dict)
    """Facts about this sample worth keeping beside its score, such as the depth of a passkey."""

    def __post_init__(self) -> None:
        """Hold the invariants that the engine relies on."""
        assert self.tail, f"sample {self.index} has an empty tail"
        assert self.context, f"sample {self.index} has an empty context"
        assert self.max_new_tokens >= 0, (
            f"sample {self.index} asks for {self.max_new_tokens} tokens"
        )


@dataclass(frozen=True)
class Outcome:
    """What decoding one row of one sample gave."""

    text: str
    """The generated tokens as text, special tokens left out."""
    token_ids: tuple[int, ...] = ()
    nll: tuple[float, ...] = ()
    """Nats of tail[1], tail[2], ... when `Sample.score_tail`: one for each step that predicts a
    token of the tail. (tail[0] is predicted by the dense prefill, which no method touches.)"""


class Task(Protocol):
    """A benchmark over one data source.

    `metric` is one of 'f1', 'rouge_l', 'accuracy', 'string_match_all' (scores 0..100, higher is
    better) and 'perplexity' (a score is the mean negative log-likelihood in nats of one sample; the
    aggregate of a point is exp of the mean, lower is better).
    """

    metric: str

    def identity(self) -> dict[str, Any]:
        """Return what the records are (source, content digest): part of a point's key, no paths."""
        ...

    def count(self) -> int:
        """Return how many samples there are, capped by the task's `samples` setting."""
        ...

    def needs(self) -> int | None:
        """Return the tokens a model must hold; None where prompts are cut to what it holds."""
        ...

    def sample(self, index: int, language: Language) -> Sample:
        """Build sample `index` in the tokens of `language`; ValueError where it cannot be built."""
        ...

    def score(self, sample: Sample, outcome: Outcome) -> float:
        """Score one outcome: 0..100, or the mean NLL in nats for perplexity."""
        ...
