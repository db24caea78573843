"""A unit of work that leaves its heartbeats: what ran when, also where it was killed midway.

`run` has the signature of `quest_dist.worker.run`; scores are those of `curve_unit`. Every sample
takes BEAT_SECONDS and writes a line every few milliseconds to BEAT_LOG, itself and not through the
driver. As a program: `python beating_unit.py OUTPUT_DIR [override ...]` runs a sweep of it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import curve_unit
import tiny_sweep
import tiny_unit

from quest_dist import closing, launch
from quest_dist.plan import Unit

BEAT = 0.005
SHAPE = (
    "{layers:3,heads:4,kv_heads:2,head_dim:16,hidden:64,vocab:128,parameters:100000,"
    "max_length:64,intermediate:96,rope_theta:10000,tied:false}"
)
#: An accuracy task of many units and three units of times.
MIXED = (
    "grid.task=[passkey,kernels_512,kernels_1k,kernels_2k]",
    f"+model.tiny.shape={SHAPE}",
    *(f"task.kernels_{length}.samples=2" for length in ("512", "1k", "2k")),
    "cluster.samples_per_unit=1",
)


class Beats(NamedTuple):
    """A sample that ran, from its first heartbeat to its last."""

    process: int
    task: str
    sample: int
    first: float
    last: float

    @property
    def timed(self) -> bool:
        return self.task.startswith("kernels")


def run(unit: Mapping[str, Any], runtime: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    work = Unit.from_dict(unit)
    for index in work.samples:
        ends = time.time() + float(os.environ["BEAT_SECONDS"])
        while time.time() < ends:
            with Path(os.environ["BEAT_LOG"]).open("a") as file:
                file.write(f"{os.getpid()} {work.first.task.name} {index} {time.time()}\n")
            time.sleep(BEAT)
        records = [tiny_unit.record(point, index) | scored(point, index) for point in work.points]
        yield {"unit": work.key, "sample": index, "records": records}


def scored(point: Any, index: int) -> dict[str, Any]:
    if point.task.name == "passkey":
        return {"score": curve_unit.score(point, index)}
    return {"metric": "attention_us", "score": 1.0 + index}


def beats(log: Path) -> list[Beats]:
    """The samples that ran, also those that were cut off."""
    lines = [line.split() for line in log.read_text().splitlines()]
    lines = [line for line in lines if len(line) == 4]
    found = []
    for (process, task, sample), group in groupby(sorted(lines), key=lambda line: line[:3]):
        times = [float(line[3]) for line in group]
        found.append(Beats(int(process), task, int(sample), min(times), max(times)))
    return found


def sweep(output_dir: Path, overrides: Sequence[str]) -> int:
    config = tiny_sweep.config(output_dir, [*MIXED, *overrides])
    return launch.run(config, run_unit="beating_unit:run", out=closing.console())


if __name__ == "__main__":
    sys.exit(sweep(Path(sys.argv[1]), sys.argv[2:]))
