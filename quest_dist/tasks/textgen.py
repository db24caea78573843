"""TextGen: the time of a whole model's decode step, at one context length.

Random weights of a model's shape, random keys and values; see quest_dist.step_times for what is
timed and quest_dist.timing for the contract.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quest_dist.tasks.sources import Source
from quest_dist.tasks.task import Cost, Speed
from quest_dist.tasks.timed import Timed

if TYPE_CHECKING:
    from quest_dist.plan import Point

VERSION = 1
#: Steps of a visit: a repeat counts whole visits.
VISIT = 4
#: What of a model's shape a whole step needs.
NEEDED = ("layers", "heads", "kv_heads", "head_dim", "hidden", "vocab", "intermediate")
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
    ) -> None:
        """Check the settings; `data` is not read."""
        super().__init__(protocol, samples, context, steps, warm_up)
        if steps % VISIT:
            raise ValueError(f"steps={steps} must be a multiple of {VISIT}")

    def identity(self) -> dict[str, Any]:
        """Return what model and cache are made of."""
        return {"source": "random weights, keys and values", "version": VERSION}

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
        cache, weights = context * token, size * int(shape["parameters"])
        reads: list[float] = [weights + cache]
        for point in points:
            if point.budget:
                kept = min(context, point.budget) + context / point.page_size
                dense = min(1.0, point.dense_layers / layers)
                reads.append(weights + token * (dense * context + (1 - dense) * kept))
        repeats = int(settings.get("samples", 9))
        seconds = (FILL * cache + MAKE * weights / repeats + steps * sum(reads)) / speed.bytes
        return Cost(seconds, 1.1 * (weights + cache))
