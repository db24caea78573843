"""A unit of work whose curves are known: budgets lose a sample with a stated chance.

`run` has the signature of `quest_dist.worker.run`. Full scores 100; a budget scores 0 on the share
of the samples that LOSS names (deterministic by point and sample). The environment may stop it
after a number of samples (CURVE_STOP, as Ctrl-C would) and logs each (CURVE_LOG).
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tiny_unit

from quest_dist.plan import Point, Unit

#: Chance that a sample is lost, by method and budget.
LOSS = {
    "quest": {64: 0.9, 128: 0.6, 256: 0.0, 512: 0.0},
    "tightbound": {64: 0.7, 128: 0.0, 256: 0.0, 512: 0.0},
    "h2o": {64: 1.0, 128: 1.0, 256: 1.0, 512: 0.9},
}


def run(unit: Mapping[str, Any], runtime: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    work = Unit.from_dict(unit)
    for index in work.samples:
        if log := os.environ.get("CURVE_LOG"):
            left = int(os.environ.get("CURVE_STOP", "1000000")) - len(evaluated(Path(log)))
            if left <= 0:
                raise KeyboardInterrupt
            with Path(log).open("a") as file:
                file.write(f"{work.first.task.name} {index} {len(work.points)}\n")
        yield {
            "unit": work.key,
            "sample": index,
            "records": [
                tiny_unit.record(p, index) | {"score": score(p, index)} for p in work.points
            ],
        }


def score(point: Point, sample: int) -> float:
    if point.budget is None:
        return 100.0
    lost = LOSS[point.method.name][point.budget]
    return 0.0 if random.Random(f"{point.key} {sample}").random() < lost else 100.0


def evaluated(log: Path) -> list[tuple[str, int, int]]:
    """What CURVE_LOG holds: (task, sample, points), one a sample that was prefilled."""
    lines = log.read_text().splitlines() if log.exists() else []
    return [(task, int(sample), int(n)) for task, sample, n in (line.split() for line in lines)]
