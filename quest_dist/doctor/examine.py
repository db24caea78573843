"""Examine: every check in a process of its own, all at once, each with its time.

So none can hang, end or slow down another: what does not answer in time is killed and said, and a
library that takes its process down takes nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from quest_dist.doctor import compute, places, services
from quest_dist.doctor.finding import Asked, Finding, problem
from quest_dist.folders import PACKAGE

Check = Callable[[Asked], Iterator[Finding]]
CHECKS: Mapping[str, Check] = {
    "toolchain": compute.toolchain,
    "kernels": compute.kernels,
    "gpu": compute.gpu,
    "memory": places.memory,
    "disk": places.disk,
    "storage": places.storage,
    "ray": services.ray,
    "mlflow": services.mlflow,
    "hub": services.hub,
    "model": places.model,
}
SECONDS, RAY_SECONDS = 20.0, 90.0  # for one check; where it starts a cluster


def examine(asked: Asked) -> list[Finding]:
    """Run all checks; return what they found, in the order of CHECKS."""
    deadline = time.monotonic() + (RAY_SECONDS if asked.start_ray else SECONDS)
    with contextlib.ExitStack() as stack:
        started = {name: _start(name, asked, stack) for name in CHECKS}
        return [found for name, check in started.items() for found in _end(name, *check, deadline)]


def one(name: str, asked: Asked) -> list[Finding]:
    """Run one check in this process; what it raises becomes its finding."""
    found: list[Finding] = []
    try:
        found += CHECKS[name](asked)
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        found.append(problem(name, f"could not be looked at ({said})", "mend what this names"))
    return found


def _start(
    name: str, asked: Asked, stack: contextlib.ExitStack
) -> tuple[subprocess.Popen[bytes], Path]:
    folder = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
    answer = Path(folder) / "answer"
    command = [sys.executable, "-m", "quest_dist.doctor", "--only", name, "--answer", str(answer)]
    command += ["--output-dir", str(asked.output_dir), "--tracking-uri", asked.tracking_uri]
    command += ["--ray"] if asked.start_ray else []
    paths = [str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    stack.callback(_kill, process)
    return process, answer


def _end(
    name: str, process: subprocess.Popen[bytes], answer: Path, deadline: float
) -> list[Finding]:
    alone = f"`python -m quest_dist.doctor --only {name}` shows what it does"
    try:
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return [problem(name, "no answer in time; its process was killed", alone)]
    try:
        return [Finding(**found) for found in json.loads(answer.read_text())]
    except (OSError, ValueError, TypeError):
        return [problem(name, f"its process ended with status {process.returncode}", alone)]


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a check and whatever it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
