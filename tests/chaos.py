"""Chaos: a sweep on Ray whose processes are killed at random until it ends.

    python -m tests.chaos --kills 20 --seed 1

Driver, a worker and the raylet get SIGKILL in turn, in an order and at moments drawn from the seed;
the same command is given again whenever the driver has ended. Then must hold, or the exit status is
1:
* the table is, byte for byte, that of a sweep left alone;
* every point is in MLflow once, finished, each of its values once;
* what the ledger held when a driver started was not evaluated by it or by its workers;
* a kill costs each worker at most the sample that it was at;
* a driver whose raylet is killed ends by itself, and no process is left.
Units are arithmetic (tiny_unit); Ray, the ledger, MLflow and the command are the real ones.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import tiny_sweep  # noqa: E402
from chaos_outcome import mlflow_problems, spread, told  # noqa: E402
from processes import Launch, kill  # noqa: E402
from tiny_unit import Started, begun  # noqa: E402

from quest_dist.bench.report import machine  # noqa: E402
from quest_dist.ledger import Ledger  # noqa: E402

SAMPLES, SECONDS = 8, 0.4  # of each seed; of each sample
#: The latest moment of a kill, in seconds: for the driver after the launch (or the kill before),
#: for the others after such a process is there.
VICTIMS = {"driver": 14.0, "worker": 5.0, "raylet": 5.0}
MOST_SECONDS = 90.0  # for anything that has to happen by itself


class Kill(NamedTuple):
    """A kill: in which launch, of what, and when (unix time)."""

    launch: int
    kind: str
    at: float


class Chaos:
    """One sweep in `folder`; afterwards `problems` says what did not hold."""

    def __init__(
        self, folder: Path, kills: int, seed: int, workers: int, patience: str = "all"
    ) -> None:
        """`patience`: whether the end of all processes is waited for, or of the workers alone."""
        self.patience = patience
        self.folder, self.out = folder, folder / "outputs"
        self.wanted, self.random = kills, random.Random(seed)
        self.workers, self.seeds = workers, max(3, kills)
        self.bag: list[str] = []  # whose turn is to come
        self.kills: list[Kill] = []
        self.launches: list[Launch] = []
        self.before: list[set[tuple[int, int]]] = []  # (seed, sample) in the ledger, by launch
        self.gone: dict[int, dict[str, float]] = {}  # launch -> (workers, all) -> unix time
        self.problems: list[str] = []

    def run(self) -> None:
        """Kill until enough was killed, let the sweep end, and look."""
        try:
            while len(self.kills) < self.wanted and not self.problems:
                if len(self.launches) > 3 * self.wanted:
                    self.problems.append("launches end before anything is killed")
                    break
                self._launch()
                while not (self._ended() or self.problems) and len(self.kills) < self.wanted:
                    self._kill(self._victim())
            (self.folder / "go").touch()
            status = self._end()
            for _ in range(3):  # what broke too often while it was held is tried again
                if status == 1 or self._killed():
                    self._launch()
                    status = self._end()
            if status != 0:
                self.problems.append(f"the sweep ended with exit status {status}")
            self._wait(MOST_SECONDS, lambda: all(self.patience in g for g in self.gone.values()))
            self._check()
        finally:
            for launch in self.launches:
                launch.kill()

    def _overrides(self, *more: str) -> list[str]:
        seeds = ",".join(map(str, range(self.seeds)))
        return [f"grid.seed=[{seeds}]", f"task.passkey.samples={SAMPLES}", *more]

    def _launch(self) -> None:
        self.before.append(self._held())
        number = len(self.launches)
        overrides = self._overrides(
            "cluster=local",
            f"cluster.workers={self.workers}",
            "cluster.samples_per_unit=4",
            "tracking=mlflow",
        )
        env = {
            "TINY_LOG": str(self._log(number)),
            "TINY_SECONDS": str(SECONDS),
            "TINY_HOLD": f"{self.seeds - 1} {self.folder / 'go'}",  # there is work to the last kill
        }
        said = self.folder / f"said-{number}"
        self.launches.append(Launch(self.out, said, *overrides, **env))
        self.gone[number] = {}

    def _victim(self) -> str:
        if not self.bag:
            self.bag = self.random.sample(list(VICTIMS), len(VICTIMS))
        return self.bag[-1]

    def _kill(self, kind: str) -> None:
        """Kill one of a kind at a random moment, unless the launch ends before."""
        launch, number = self.launches[-1], len(self.launches) - 1
        moment = self.random.uniform(0, VICTIMS[kind])
        if kind != "driver":
            there = self._wait(MOST_SECONDS, lambda: launch.ended() or launch.processes(kind))
            if not there:
                self.problems.append(f"launch {number} has no {kind}")
        self._wait(moment, launch.ended)
        found = [] if launch.ended() else launch.processes(kind)
        if not found or not kill(self.random.choice(found).pid):
            return
        self.kills.append(Kill(number, self.bag.pop(), time.time()))
        print(f"{len(self.kills)}/{self.wanted}: {kind} of launch {number}", flush=True)
        if kind != "worker" and not self._wait(MOST_SECONDS, launch.ended):
            self.problems.append(f"the driver of launch {number} outlived its {kind}")

    def _ended(self) -> bool:
        return self.launches[-1].ended()

    def _killed(self) -> bool:
        """Whether the newest launch ended because of a kill."""
        last = self.kills[-1]
        return last.launch == len(self.launches) - 1 and last.kind != "worker"

    def _end(self) -> int | None:
        self._wait(10 * MOST_SECONDS, self._ended)
        return self.launches[-1].driver.poll()

    def _wait(self, seconds: float, until: Callable[[], object]) -> bool:
        """Wait, at most so long, until something holds; meanwhile note what is gone."""
        deadline = time.monotonic() + seconds
        while not until():
            if time.monotonic() > deadline:
                return False
            self._look()
            time.sleep(0.1)
        return True

    def _look(self) -> None:
        for number, launch in enumerate(self.launches):
            gone = self.gone[number]
            if "all" not in gone and launch.ended():
                left = launch.processes()
                if not any(process.kind == "worker" for process in left):
                    gone.setdefault("workers", time.time())
                if not left:
                    gone["all"] = time.time()

    def _log(self, number: int) -> Path:
        return self.folder / f"log-{number}"

    def _held(self) -> set[tuple[int, int]]:
        """What the ledger holds, while no driver runs."""
        if not (self.out / "ledger.db").exists():
            return set()
        points = tiny_sweep.points(self.out, *self._overrides())
        with Ledger(self.out / "ledger.db") as ledger:
            whole: dict[int, set[int]] = {}
            for point in points:
                done = ledger.done(point.key)
                whole[point.seed] = whole.get(point.seed, done) & done
        return {(seed, sample) for seed, samples in whole.items() for sample in samples}

    def evaluations(self) -> list[list[Started]]:
        """What each launch began to evaluate."""
        return [begun(self._log(number)) for number in range(len(self.launches))]

    def _check(self) -> None:
        alone = self.folder / "alone"
        tiny_sweep.run(alone, *self._overrides())
        path = self.out / "tiny" / "points.csv"
        found = path.read_text() if path.exists() else ""
        if found != tiny_sweep.table(alone) or len(found.splitlines()) != 1 + 3 * self.seeds:
            self.problems.append("the table is not that of a sweep left alone")
        for number, began in enumerate(self.evaluations()):
            if again := {(s.seed, s.sample) for s in began} & self.before[number]:
                self.problems.append(f"launch {number} evaluated again {sorted(again)}")
        if self.wasted() > len(self.kills) * self.workers:
            self.problems.append(f"{self.wasted()} samples were evaluated for nothing")
        if left := [n for n, gone in self.gone.items() if self.patience not in gone]:
            self.problems.append(f"processes of launches {left} are left")
        if list(self.out.rglob("round-*")):
            self.problems.append("Tune's files are left")
        killed = {kill.launch for kill in self.kills if kill.kind == "driver"}
        for number, launch in enumerate(self.launches):
            if number not in killed and "Traceback" in launch.said.read_text(errors="replace"):
                self.problems.append(f"launch {number} ended in a traceback")
        wanted = [point.key for point in tiny_sweep.points(self.out, *self._overrides())]
        self.problems += mlflow_problems(self.out / "mlflow.db", wanted, SAMPLES)

    def wasted(self) -> int:
        """Samples whose evaluation was begun and came to nothing."""
        return sum(map(len, self.evaluations())) - self.seeds * SAMPLES

    def recoveries(self, kind: str) -> list[float]:
        """Seconds from a kill to the next sample that a process new since then began; without
        kills that another kill cut short."""
        began = sorted(s for found in self.evaluations() for s in found)
        began.sort(key=lambda started: started.at)
        found = []
        ends = [kill.at for kill in self.kills[1:]] + [float("inf")]
        for killed, end in zip(self.kills, ends, strict=True):
            old = {s.pid for s in began if s.at <= killed.at}
            new = [s.at for s in began if killed.at < s.at < end and s.pid not in old]
            if killed.kind == kind and new:
                found.append(new[0] - killed.at)
        return found

    def lingering(self, what: str) -> list[float]:
        """Seconds from the kill of a driver or raylet until its workers (or all) were gone."""
        ended = {k.launch: k.at for k in self.kills if k.kind != "worker"}
        return [self.gone[n][what] - at for n, at in ended.items() if what in self.gone[n]]

    def result(self) -> dict[str, Any]:
        """What happened, as JSON."""
        total = self.seeds * SAMPLES
        return {
            "benchmark": "a sweep whose processes are killed at random until it ends",
            "machine": machine(),
            "kills": dict(Counter(kill.kind for kill in self.kills)),
            "launches": len(self.launches),
            "workers": self.workers,
            "points": 3 * self.seeds,
            "samples": total,
            "seconds_a_sample": SECONDS,
            "samples_begun_for_nothing": self.wasted(),
            "seconds_to_a_new_process_that_evaluates": {
                kind: spread(self.recoveries(kind)) for kind in VICTIMS
            },
            "seconds_until_gone": {
                "workers": spread(self.lingering("workers")),
                "every process": spread(self.lingering("all")),
            },
            "problems": self.problems,
        }


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="a new folder for everything that is written")
    parser.add_argument("--json", type=Path, help="a file for the result")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="chaos-") as made:
        folder = given.keep or Path(made)
        folder.mkdir(parents=True, exist_ok=True)
        chaos = Chaos(folder, given.kills, given.seed, given.workers)
        chaos.run()
        result = {"seed": given.seed, **chaos.result()}
        print(told(result))
        if given.json:
            given.json.write_text(json.dumps(result, indent=1) + "\n")
    survived = 0 if chaos.problems else len(chaos.kills)
    print(f"{survived} of {given.kills} kills survived")
    return 0 if survived == given.kills else 1


if __name__ == "__main__":
    sys.exit(main())
