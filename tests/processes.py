"""A launch of the tiny sweep as a process of its own, and every process that it started.

Linux: each launch leads a session, which its processes stay in whoever dies, and by which they are
found. A zombie is no process here: it holds nothing.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).resolve().parent


class Process(NamedTuple):
    """A living process: its number and what it is: driver, raylet, worker (of units) or other."""

    pid: int
    kind: str


class Launch:
    """`python PROGRAM OUTPUT_DIR ...`, its words in a file. `env` is added to ours."""

    def __init__(
        self,
        out: Path,
        said: Path,
        *overrides: str,
        program: str = "tiny_sweep.py",
        **env: str,
    ) -> None:
        self.said = said
        paths = f"{TESTS.parent}{os.pathsep}{TESTS}"
        with said.open("w") as file:
            self.driver = subprocess.Popen(
                [sys.executable, str(TESTS / program), str(out), *overrides],
                env={**os.environ, "PYTHONPATH": paths, **env},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.started = time.time()

    def processes(self, kind: str | None = None) -> list[Process]:
        """The living processes of the launch, of one kind if asked."""
        found = [Process(pid, self._kind(pid)) for pid in _session(self.driver.pid)]
        return [process for process in found if kind in (None, process.kind)]

    def ended(self) -> bool:
        """Whether the driver has ended."""
        return self.driver.poll() is not None

    def status(self, seconds: float = 120.0) -> int:
        """Wait for the driver; its exit status (-9: killed)."""
        return self.driver.wait(seconds)

    def kill(self) -> None:
        """Kill whatever is left of it."""
        for process in self.processes():
            kill(process.pid)
        self.driver.wait()

    def _kind(self, pid: int) -> str:
        if pid == self.driver.pid:
            return "driver"
        words = _text(f"/proc/{pid}/cmdline").split("\0")
        if words[0].startswith("ray::ImplicitFunc"):
            return "worker"
        return "raylet" if words[0].endswith("/raylet/raylet") else "other"


def kill(pid: int) -> bool:
    """SIGKILL; whether the process was still there."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def until(holds: Callable[[], object], seconds: float, what: str) -> float:
    """Wait until something holds; the seconds it took. AssertionError, saying `what`, if not."""
    started = time.monotonic()
    while not holds():
        assert time.monotonic() - started < seconds, what
        time.sleep(0.05)
    return time.monotonic() - started


def _session(leader: int) -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            # pid (name) state parent group session ...; a name may hold anything
            fields = _text(f"/proc/{folder.name}/stat").rpartition(")")[2].split()
            if fields and fields[0] != "Z" and int(fields[3]) == leader:
                found.append(int(folder.name))
    return found


def _text(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:  # it has ended meanwhile
        return ""
