"""One launch in a process of its own, and what it took its driver.

    python -m quest_dist.bench.one_launch MODULE:FUNCTION < config.json

The function is what workers call; the last line of the output is the JSON of a `Took`.
"""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from quest_dist import launch


@dataclass(frozen=True)
class Took:
    """Of one launch: its exit `status`, `wall` seconds and the `busy` seconds that the driver's
    process computed in them, all its threads together; `whole` seconds of the process, imports
    included; resident MiB at the end (`rss`) and at most (`peak`)."""

    status: int
    wall: float
    busy: float
    rss: float
    peak: float
    whole: float = 0.0


def took(config: Mapping[str, Any], run_unit: str) -> Took:
    """Launch a composed configuration in a fresh process; RuntimeError where that breaks."""
    command = [sys.executable, "-m", "quest_dist.bench.one_launch", run_unit]
    start = time.perf_counter()
    done = subprocess.run(command, input=json.dumps(config), capture_output=True, text=True)
    whole = time.perf_counter() - start
    if done.returncode:
        last = (done.stderr.strip() or "no word").splitlines()[-1]
        raise RuntimeError(f"{config['name']}: the launch ended with {done.returncode}: {last}")
    return Took(**{**json.loads(done.stdout.splitlines()[-1]), "whole": whole})


def here(config: Mapping[str, Any], run_unit: str) -> Took:
    """Launch it in this process."""
    out = Console(file=io.StringIO(), width=120)
    wall, busy = time.perf_counter(), time.process_time()
    status = launch.run(config, run_unit=run_unit, out=out)
    wall, busy = time.perf_counter() - wall, time.process_time() - busy
    return Took(status, wall, busy, _resident("VmRSS"), _resident("VmHWM"))


def _resident(name: str) -> float:
    """MiB that /proc says of this process."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    if found is None:
        raise RuntimeError(f"/proc/self/status: no {name}; this benchmark needs Linux")
    return int(found[1]) / 1024


if __name__ == "__main__":
    print(json.dumps(asdict(here(json.load(sys.stdin), sys.argv[1]))))
