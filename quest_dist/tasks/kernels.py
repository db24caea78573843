"""Kernels: the time of one attention layer in one decode step, at one context length.

Random keys, values and queries of a model's shape; see quest_dist.kernel_times for what is timed,
and quest_dist.timing for the contract.
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
#: For estimates: calls of a visit and of a warm-up, bytes of the read, a fill over a read.
VISIT, WARM_UP, READ_BYTES, FILL = 4, 4, 256 << 20, 12.0


class Kernels(Timed):
    """Microseconds of attention, the median of `cycles` visits of a repeat."""

    metric = "attention_us"
    evaluated_by = "quest_dist.kernel_times:evaluate"
    made_of = "random_keys"
    counted = "cycles"

    def __init__(
        self,
        *,
        data: Source | None = None,
        seed: int = 0,
        protocol: Mapping[str, Any] | None = None,
        samples: int = 9,
        context: int = 8192,
        cycles: int = 3,
        warm_up: int | None = None,
    ) -> None:
        """Check the settings; `data` is not read."""
        super().__init__(protocol, samples, context, cycles, warm_up)

    def identity(self) -> dict[str, Any]:
        """Return what the cache is made of."""
        return {"source": "random keys and values", "version": VERSION}

    @staticmethod
    def cost(points: Sequence[Point], shape: Mapping[str, Any], speed: Speed) -> Cost:
        """Return the seconds of a repeat: layers are filled, and every side visited."""
        settings = points[0].task.settings
        context = int(settings["context"])
        size = 4 if points[0].model.settings.get("dtype") == "float32" else 2
        token = 2 * size * int(shape["kv_heads"]) * int(shape["head_dim"])
        layer, page_size = context * token, points[0].page_size
        closed = layer / page_size
        reads: list[float] = [READ_BYTES + layer]
        reads += [2 * (closed + token * min(p.budget, context)) for p in points if p.budget]
        calls = int(settings.get("warm_up") or WARM_UP) + VISIT * int(settings["cycles"])
        layers = max(2.0, READ_BYTES / max(1.0, closed) / 8)
        held = layers * (layer + closed)
        seconds = (FILL * held + calls * sum(reads)) / speed.bytes
        return Cost(seconds, held + READ_BYTES + 2 * layer)
