"""Processes that need an artefact at the same time, forked from one that has imported what they
need, which takes longer than what they do.

`python artefact_maker.py FOLDER` reads lines of JSON, each a list of arguments of `need`; it runs
a process for each of a list, and answers with a line of their exit codes and what they said.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import torch as files

from quest_dist import artefacts, models
from quest_dist.calibrators import kvquant
from quest_dist.spec import Spec

TESTS = Path(__file__).resolve().parent
#: That a process may take before it is ended.
SECONDS = 120


class Ended(NamedTuple):
    """A process that ended: how, and what it said."""

    code: int
    said: str


class Maker:
    """The process that forks the others; it imports while its owner does something else."""

    def __init__(self, folder: Path) -> None:
        # Threads of a parent are lost to its forks.
        alone = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), str(folder)],
            env={**os.environ, **alone, "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def together(self, *jobs: dict[str, Any]) -> list[Ended]:
        """Run a process for each of the arguments of `need`, all at once."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(jobs) + "\n")
        self.process.stdin.flush()
        return [Ended(*one) for one in json.loads(self.process.stdout.readline())]

    def close(self) -> None:
        """End it; those that it forked have ended."""
        self.process.kill()
        self.process.communicate()


def need(
    cache: str, folder: str, method: str, settings: dict[str, Any], log: str, dies: bool
) -> str:
    """Where a process has the artefact of a method for the model in a folder.

    The calibrator notes each start in `log`; who `dies` is killed while it writes.
    """
    make, save = kvquant.make, files.save_file

    def noted(*arguments: Any) -> Any:
        with Path(log).open("a") as file:
            file.write("made\n")
        return make(*arguments)

    def killed(tensors: Any, name: str, metadata: Any) -> None:
        save(tensors, name, metadata=metadata)
        Path(name).write_bytes(Path(name).read_bytes()[:-200])
        os.kill(os.getpid(), signal.SIGKILL)

    os.environ["XDG_CACHE_HOME"] = cache
    kvquant.make = noted
    files.save_file = killed if dies else save
    loaded = load(folder)
    with torch.inference_mode():  # as the engine asks for it
        return str(artefacts.ready(loaded, Spec(method, settings)))


def load(folder: str) -> Any:
    """The tiny model."""
    return models.load({"source": "local", "path": folder, "dtype": "float32"})


def forked(job: dict[str, Any]) -> tuple[int, int]:
    """A process for one job: its number, and where it says what."""
    reading, writing = os.pipe()
    number = os.fork()
    if number == 0:
        code = 1
        signal.alarm(SECONDS)
        try:
            os.write(writing, need(**job).encode())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writing)
    return number, reading


def ended(number: int, reading: int) -> Ended:
    """Wait for a process."""
    with os.fdopen(reading) as file:
        said = file.read()
    return Ended(os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]), said)


def main(folder: str) -> None:
    """Import what the processes need, then run those that are asked for."""
    load(folder)
    artefacts.bundled_text()
    for line in sys.stdin:
        started = [forked(job) for job in json.loads(line)]
        print(json.dumps([ended(*one) for one in started]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
