"""Sample, Outcome and Task: what is handed to an evaluation, and what it gives back.

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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from quest_dist.plan import Point
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
    facts: Mapping[str, float] = field(default_factory=dict)
    """Numbers that the evaluation measured beside what is scored, such as the parts of a time."""
    curve: tuple[tuple[float, float], ...] = ()
    """(x, y) pairs of an evaluation that gives more than one number; the task says what x is."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """Texts to keep beside the score, such as the device that a time was measured on."""
    drawing: Mapping[str, Any] | None = None
    """Plain JSON that the task's figure draws as it is; of a point, its first sample's is kept."""


@dataclass(frozen=True)
class Speed:
    """What a machine is taken to do, for estimates: FLOP and bytes read a second."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Cost:
    """What one sample costs for the points of one unit, and the memory of its worker beside
    Python's own."""

    seconds: float
    bytes: float


class Task(Protocol):
    """A benchmark over one data source.

    `metric` names the unit of a score (see quest_dist.stats): 'f1', 'rouge_l', 'accuracy',
    'string_match_all', 'recall' and 'attention' are 0..100, higher is better; 'perplexity' samples
    are mean negative log-likelihoods in nats, and a point's value is exp of their mean;
    'attention_us' and 'step_ms' are times; 'tokens_per_pass' counts from 1, higher is better.
    """

    metric: str
    evaluated_by: ClassVar[str] = "quest_dist.engine:evaluate"
    """What a worker calls for a sample: module:function of (loaded, sample, points)."""
    exclusive: ClassVar[bool] = False
    """True: what is measured is time, so nothing else may run on the device meanwhile."""
    needs_weights: ClassVar[bool] = True
    """False: the model's shape will do, and nothing is loaded or downloaded for it."""
    needs_float32: ClassVar[bool] = False
    """True: what is compared must not depend on rounding, so the model runs in float32."""
    made_of: ClassVar[str] = ""
    """What it measures on, in figures' words, where that is not the data of the sweep."""
    x: ClassVar[str] = ""
    """What the x of its curve is, in figures' words; empty for a task without a curve."""

    def identity(self) -> dict[str, Any]:
        """Return what the records are (source, content digest): part of a point's key, no paths."""
        ...

    def count(self) -> int:
        """Return how many samples there are, capped by the task's `samples` setting."""
        ...

    def needs(self) -> int | None:
        """Return the tokens a model must hold; None where prompts are cut to what it holds."""
        ...

    def check_method(self, method: Any) -> None:
        """Raise ValueError for a method that this task cannot run; any by default."""

    def check_model(self, shape: Mapping[str, Any]) -> None:
        """Raise ValueError for a model's shape that this task cannot run; any by default."""

    def other_models(self) -> Mapping[str, Mapping[str, Any]]:
        """Return the models that it loads beside the grid's, by the setting that names each."""
        return {}

    @staticmethod
    def cost(points: Sequence[Point], shape: Mapping[str, Any], speed: Speed) -> Cost | None:
        """Return what a sample costs for `points` of one unit; None (the default) where it is a
        prefill and decode steps, as cost.py guesses."""
        return None

    def sample(self, index: int, language: Language) -> Sample:
        """Build sample `index` in the tokens of `language`; ValueError where it cannot be built."""
        ...

    def score(self, sample: Sample, outcome: Outcome) -> float:
        """Score one outcome, in the metric's unit for one sample."""
        ...

    def curve(self, sample: Sample, outcome: Outcome) -> tuple[tuple[float, float], ...]:
        """Return (x, y) pairs of one outcome, y in the unit of a score; none by default."""
        return outcome.curve
