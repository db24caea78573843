"""A real unit of work that needs no model: arithmetic on a point's settings, in milliseconds.

`run` has the signature of `quest_dist.worker.run`. The environment slows it down (TINY_SECONDS),
holds samples until a file is there (TINY_HOLD: the least seed that waits, and the file), logs each
sample it starts (TINY_LOG), or breaks it: TINY_KILL_AT and TINY_RAISE_AT name a sample,
TINY_ERROR_AT a sample whose records carry an error, TINY_REFUSE refuses the whole unit. TINY_SEES
names a variable, whose length ends the line of TINY_LOG.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from quest_dist.plan import Point, Unit


def run(unit: Mapping[str, Any], runtime: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    work = Unit.from_dict(unit)
    if os.environ.get("TINY_REFUSE"):
        raise ValueError("refused on purpose")
    for index in work.samples:
        if log := os.environ.get("TINY_LOG"):
            first = work.first
            line = (
                f"{first.task.name} {index} {len(work.points)} {first.seed} {time.time():.3f}"
                f" {first.model.name} {os.getpid()}"
            )
            if sees := os.environ.get("TINY_SEES"):
                line += f" {len(os.environ.get(sees, ''))}"
            with Path(log).open("a") as lines:
                lines.write(line + "\n")
        if os.environ.get("TINY_KILL_AT") == str(index):
            os.kill(os.getpid(), signal.SIGKILL)
        if os.environ.get("TINY_RAISE_AT") == str(index):
            raise RuntimeError("broken on purpose")
        time.sleep(float(os.environ.get("TINY_SECONDS", "0")))
        seed, _, file = os.environ.get("TINY_HOLD", "").partition(" ")
        while file and work.first.seed >= int(seed) and not Path(file).exists():
            time.sleep(0.05)
        error = "ValueError: wrong" if os.environ.get("TINY_ERROR_AT") == str(index) else None
        records = [record(point, index, error) for point in work.points]
        yield {"unit": work.key, "sample": index, "records": records}


def record(point: Point, index: int, error: str | None = None) -> dict[str, Any]:
    budget = float(point.budget or 4096)
    return {
        "point": point.key,
        "sample": index,
        "score": None if error else (budget * 7 + index * 13 + point.seed) % 101,
        "prediction": f"answer {index}",
        "reference": "answer",
        "attended": budget,
        "planned": budget,
        "read": budget,
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
        "details": {},
    }


def started(log: Path) -> list[tuple[str, int, int]]:
    """What TINY_LOG holds: (task, sample, points) in the order of starting."""
    lines = log.read_text().splitlines() if log.exists() else []
    return [(t, int(i), int(n)) for t, i, n, *_ in (line.split() for line in lines)]


class Started(NamedTuple):
    """A line of TINY_LOG: whose seed and sample were begun, when (unix time), by which process."""

    seed: int
    sample: int
    at: float
    pid: int


def begun(log: Path) -> list[Started]:
    """What TINY_LOG holds, in the order of starting."""
    lines = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
    return [Started(int(seed), int(i), float(at), int(pid)) for _, i, _, seed, at, _, pid in lines]


def models_by_process(log: Path) -> dict[str, set[str]]:
    """The models that each process worked for."""
    found: dict[str, set[str]] = {}
    for *_, model, pid in (line.split() for line in log.read_text().splitlines()):
        found.setdefault(pid, set()).add(model)
    return found
