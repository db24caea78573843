"""A unit of work that says on which node of `raylets` it ran, and takes as long as it says.

`run` has the signature of `quest_dist.worker.run`. A sample takes NODE_SECONDS for every 1,000
tokens of its task's context, less on a node of more than one NODE_SPEED; on one with a NODE_HOLD,
samples from 4 on wait for that file (`raylets` sets what is a node's own). NODE_LOG gets a line for
each sample that begins. As a program: `python node_unit.py OUTPUT_DIR [override ...]` runs a sweep.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tiny_sweep
import tiny_unit

from quest_dist import closing, launch, sweep
from quest_dist.plan import Unit

#: A model whose shape makes a unit of 8K tokens take some 4 GiB, one of 1K half of that.
SHAPE = (
    "{layers:32,heads:32,kv_heads:32,head_dim:64,hidden:2048,vocab:1000,parameters:100000000,"
    "max_length:16384,intermediate:96,rope_theta:10000,tied:false}"
)


class Begun(NamedTuple):
    """A line of NODE_LOG: a sample of a task that was begun, on which node, by which process."""

    task: str
    sample: int
    node: str
    pid: int
    at: float


def run(unit: Mapping[str, Any], runtime: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    work = Unit.from_dict(unit)
    tokens = int(work.first.task.settings["length"])
    seconds = float(os.environ["NODE_SECONDS"]) * tokens / 1000
    for index in work.samples:
        with Path(os.environ["NODE_LOG"]).open("a") as lines:
            node = os.environ.get("NODE_NAME", "?")
            lines.write(f"{work.first.task.name} {index} {node} {os.getpid()} {time.time():.3f}\n")
        hold = os.environ.get("NODE_HOLD")
        while hold and index >= 4 and not Path(hold).exists():
            time.sleep(0.05)
        time.sleep(seconds / float(os.environ.get("NODE_SPEED", "1")))
        records = [tiny_unit.record(point, index) for point in work.points]
        yield {"unit": work.key, "sample": index, "records": records}


def begun(log: Path) -> list[Begun]:
    """What NODE_LOG holds, in the order of beginning."""
    lines = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
    return [Begun(t, int(i), node, int(pid), float(at)) for t, i, node, pid, at in lines]


if __name__ == "__main__":

    def command() -> int:
        config = tiny_sweep.config(Path(sys.argv[1]), sys.argv[2:])
        return launch.run(config, run_unit="node_unit:run", out=closing.console())

    sys.exit(sweep.in_one_line(command))
