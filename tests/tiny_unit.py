"""A real unit of work that needs no model: arithmetic on the point's settings, in milliseconds.

`run` has the signature of `quest_dist.worker.run`. Environment variables of a test slow it down,
make it fail or kill its process at one sample.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from quest_dist.plan import Unit


def run(unit: Mapping[str, Any], runtime: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    work = Unit.from_dict(unit)
    settings = work.first.task.settings
    pids = settings.get("log")
    for index in work.samples:
        if settings.get("die_at") == index:
            os.kill(os.getpid(), signal.SIGKILL)
        if settings.get("raise_at") == index:
            raise RuntimeError("broken on purpose")
        if settings.get("refuse"):
            raise ValueError("settings refused on purpose")
        time.sleep(float(settings.get("seconds", 0.0)))
        if pids:
            with Path(pids).open("a") as file:
                file.write(f"{os.getpid()} {work.first.model.name} {index}\n")
        yield {
            "unit": work.key,
            "sample": index,
            "records": [record(point, index) for point in work.points],
        }


def record(point: Any, index: int, error: str | None = None) -> dict[str, Any]:
    budget = point.budget or 4096
    return {
        "point": point.key,
        "sample": index,
        "score": None if error else float((budget * 7 + index * 13 + point.seed) % 101),
        "prediction": f"answer {index}",
        "reference": "answer",
        "attended": float(budget),
        "planned": float(budget),
        "read": float(budget),
        "context_tokens": 4096,
        "tail_tokens": 8,
        "new_tokens": 4,
        "truncated": False,
        "seconds": 0.5,
        "prefill_seconds": 1.5,
        "finished_at": 1000.0 + index,
        "error": error,
        "metric": "accuracy",
        "metrics": {},
    }
