"""Sparsity by layer: what leaving out most of one layer's cache costs, all other layers dense.

Samples are PG-19's: a prefilled beginning and tokens to predict. A point's curve is, by layer, how
many nats a token its method adds when it is active in that layer only; figure 3 of the paper asks
for which budgets that stays below a bound on perplexity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from quest_dist.tasks.pg19 import PG19
from quest_dist.tasks.sources import Source
from quest_dist.tasks.task import Outcome, Sample


class Sparsity(PG19):
    """Mean increase in nats of `tokens` tokens after `prefill` tokens, one sparse layer at a time.

    Its score is the mean over layers, which no figure draws.
    """

    metric = "nll_increase"
    evaluated_by: ClassVar[str] = "quest_dist.sparsity:evaluate"
    x = "layer"

    def __init__(
        self,
        *,
        data: Source,
        seed: int = 0,
        protocol: Mapping[str, Any] | None = None,
        samples: int = 10,
        prefill: int = 2048,
        tokens: int = 32,
        layers: Sequence[int] | None = None,
    ) -> None:
        """`layers` are those to measure, None for all. Raises ValueError for wrong settings."""
        super().__init__(
            data=data,
            seed=seed,
            protocol=protocol,
            samples=samples,
            prefill=prefill,
            tokens=tokens,
        )
        if layers is not None and (
            not layers
            or len(set(layers)) < len(layers)
            or any(type(layer) is not int or layer < 0 for layer in layers)
        ):
            raise ValueError(f"task.layers={layers!r}: null, or different numbers of at least 0")

    def score(self, sample: Sample, outcome: Outcome) -> float:
        """Return the mean increase over layers, in nats."""
        return sum(y for _, y in outcome.curve) / len(outcome.curve)

    def curve(self, sample: Sample, outcome: Outcome) -> tuple[tuple[float, float], ...]:
        """Return (layer, increase in nats)."""
        return outcome.curve
