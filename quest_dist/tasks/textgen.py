"""TextGen: the time of a whole model's decode step, at one context length.

Random weights of a model's shape, random keys and values; see quest_dist.step_times for what is
timed and quest_dist.timing for the contract.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from quest_dist.tasks.prompt import Language
from quest_dist.tasks.sources import Source
from quest_dist.tasks.task import Cost, Sample, Speed
from quest_dist.tasks.timed import Timed

if TYPE_CHECKING:
    from quest_dist.plan import Point

VERSION = 1
#: Steps of a visit: a repeat counts whole visits.
VISIT = 4
#: What of a model's shape a whole step needs.
NEEDED = ("layers", "heads", "kv_heads", "head_dim", "hidden", "vocab", "intermediate")
#: Bytes of a weight in 4 bits, its share of its group's scale and zero included (see ops.h).
PACKED_BYTES = 0.53125
WEIGHT_BITS = (None, 16, 4)
#: For estimates: steps of a warm-up; time to make random weights, and to fill a cache, over a read.
WARM_UP, MAKE, FILL = 4, 60.0, 12.0


def check_shape(shape: Mapping[str, Any]) -> None:
    """Raise ValueError unless a model's `shape` says all that its whole decode step needs."""
    for name in (*NEEDED, "rope_theta", "tied"):
        if name not in shape:
            raise ValueError(f"shape.{name} is not set; a whole model's step cannot be timed")
    if shape.get("qkv_bias"):
        raise ValueError("shape.qkv_bias=true: only steps of models without are timed; choose one")


class TextGen(Timed):
    """Milliseconds a token, the median of the `steps` that a repeat counts."""

    metric = "step_ms"
    evaluated_by = "quest_dist.step_times:evaluate"
    made_of = "random_weights"
    counted = "steps"

    def __init__(
        self,
        *,
        data: Source | None = None,
        seed: int = 0,
        protocol: Mapping[str, Any] | None = None,
        samples: int = 9,
        context: int = 8192,
        steps: int = 8,
        warm_up: int | None = None,
        weight_bits: int | None = None,
    ) -> None:
        """Check the settings; `data` is not read. `weight_bits` None: as the model has them."""
        super().__init__(protocol, samples, context, steps, warm_up)
        if weight_bits not in WEIGHT_BITS:
            raise ValueError(f"weight_bits={weight_bits!r}: choose from 16, 4, null (the model's)")
        self.weight_bits = weight_bits
        if steps % VISIT:
            raise ValueError(f"steps={steps} must be a multiple of {VISIT}")

    def identity(self) -> dict[str, Any]:
        """Return what model and cache are made of."""
        return {"source": "random weights, keys and values", "version": VERSION}

    def sample(self, index: int, language: Language) -> Sample:
        """Return repeat `index`, which says how many bits weights have."""
        sample = super().sample(index, language)
        return replace(sample, info={**sample.info, "weight_bits": self.weight_bits})

    def check_model(self, shape: Mapping[str, Any]) -> None:
        """Raise ValueError unless the shape says all that a whole step needs."""
        check_shape(shape)

    @staticmethod
    def cost(points: Sequence[Point], shape: Mapping[str, Any], speed: Speed) -> Cost:
        """Return the seconds of a repeat: a cache is filled, and each side makes its steps."""
        settings = points[0].task.settings
        context, steps = int(settings["context"]), int(settings["steps"])
        steps += int(settings.get("warm_up") or WARM_UP)
        size = 4 if points[0].model.settings.get("dtype") == "float32" else 2
        layers, heads = int(shape["layers"]), int(shape["kv_heads"]) * int(shape["head_dim"])
        token = 2 * size * layers * heads
        parameters = int(shape["parameters"])
        made = size * parameters
        weights: float = made
        if settings.get("weight_bits") == 4:
            looked_up = int(shape["vocab"]) * int(shape["hidden"])
            rest = looked_up * (1 if shape["tied"] else 2)
            weights = size * rest + PACKED_BYTES * (parameters - rest)
        cache = context * token
        reads: list[float] = [weights + cache]
        for point in points:
            if point.budget:
                kept = min(context, point.budget) + context / point.page_size
                dense = min(1.0, point.dense_layers / layers)
                reads.append(weights + token * (dense * context + (1 - dense) * kept))
        repeats = int(settings.get("samples", 9))
        seconds = (FILL * cache + MAKE * made / repeats + steps * sum(reads)) / speed.bytes
        return Cost(seconds, 1.1 * (made + cache))
