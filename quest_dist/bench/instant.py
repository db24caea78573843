"""Instant: a unit of work that takes no time, so that all a launch takes is what launching costs.

It stands in for `quest_dist.worker.run`, under the same scheduler, and yields records of the real
shape whose scores are a function of the point and the sample. Each carries, as the metric `waited`,
the seconds for which the report before it held this worker up: a worker goes on only when the
driver has taken its report, so the longest is the longest stall of the driver's loop.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from quest_dist.plan import Point, Unit

RUN = "quest_dist.bench.instant:run"
_waited: list[float] = []  # of this process's last report


def run(unit: Mapping[str, Any], runtime: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield {"unit": key, "sample": index, "records": [...]} for each sample of a unit, at once."""
    work = Unit.from_dict(unit)
    for index in work.samples:
        waited = _waited.pop() if _waited else 0.0
        records = [_record(point, index, waited) for point in work.points]
        start = time.perf_counter()
        yield {"unit": work.key, "sample": index, "records": records}
        _waited[:] = [time.perf_counter() - start]


def _record(point: Point, index: int, waited: float) -> dict[str, Any]:
    attended = float(point.budget or 4096)
    return {
        "point": point.key,
        "sample": index,
        "score": float((int(point.key[:8], 16) // 7 + 13 * index) % 101),
        "prediction": f"an answer as long as many are, to question {index}",
        "reference": "the answer",
        "attended": attended,
        "planned": attended,
        "read": attended,
        "context_tokens": 4096,
        "tail_tokens": 24,
        "new_tokens": 16,
        "truncated": False,
        "seconds": 0.0,
        "prefill_seconds": 0.0,
        "finished_at": time.time(),
        "error": None,
        "metric": "accuracy",
        "metrics": {"waited": waited},
        "details": {},
    }
