"""Units on Ray Tune: one trial a unit, actors reused so that a loaded model stays loaded.

A round is a fresh `Tuner` over the units that are left: what Tune stores is disposable, and
continuing, retrying and widening a grid are the same thing to it. Trials of one model share a
placement key (a few bytes of `memory` that differ by model), so that an actor is reused only for
its own model. A cluster that was running before is attached to and left running; its nodes are
looked at first (`schedule_ray_nodes`). Which trial is next stands in `schedule_ray_order`.

Everything that concerns Ray is in this module and those two.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import logging
import math
import os
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import quest_dist
from quest_dist import redact
from quest_dist.cluster import Cluster, Workers, check_fits
from quest_dist.plan import Unit
from quest_dist.schedule import Round, by_model, can_retry, resolve, witnessed
from quest_dist.worker import Runtime, describe

# Read by Ray when it is imported: no telemetry, no per-trial log files, no change of directory.
_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "1e9",  # nothing reads the state that Tune would keep saving
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}
for _name, _value in _SETTINGS.items():
    os.environ.setdefault(_name, _value)

import ray  # noqa: E402
import ray.exceptions  # noqa: E402
from ray import tune  # noqa: E402
from ray._private import ray_constants  # noqa: E402
from ray.air._internal import usage  # noqa: E402
from ray.tune.progress_reporter import TrialProgressCallback  # noqa: E402

from quest_dist import schedule_ray_nodes as nodes  # noqa: E402
from quest_dist.schedule_ray_order import (  # noqa: E402
    Dealing,
    Dealt,
    Replacing,
    dealer_of,
    key_of,
)

# To count callbacks for the telemetry that is off, Ray would import MLflow: a second, and 150 MiB.
usage.tag_callbacks = lambda callbacks: False

_JOINING = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
OBJECT_STORE_BYTES = 200 * 2**20  # reports are small; Ray would take 30 % of the memory
#: Variables of the driver that the workers of an attached cluster get too.
_CARRIED = ("HF_", "QUEST_", "OMP_", "TOKENIZERS_")


class Tuned:
    """A connection to Ray and how to run rounds on it; a context manager.

    A private cluster has `cpus` CPUs, of which each worker of a round is given its share, whatever
    threads it runs, so that no more workers than asked for fit at once.
    """

    def __init__(self, cluster: Cluster, storage: Path, run_unit: str, cpus: int) -> None:
        self.cluster, self.cpus = cluster, cpus
        self.storage, self.run_unit = storage.absolute(), run_unit
        self._started = False
        self._ending = threading.Event()
        self._rounds = 0
        self._looked_at: set[str] = set()  # nodes
        self._secrets: dict[str, str] = {}
        self._joining = os.environ.get(_JOINING), ray_constants.ENABLE_RAY_CLUSTER

    def __enter__(self) -> Tuned:
        """Connect; what a killed driver left of its rounds goes, for nothing reads it."""
        for left in self.storage.glob("round-*"):
            shutil.rmtree(left, ignore_errors=True)
        try:
            if not ray.is_initialized():
                self._started = True
                if self.cluster.address is None:
                    self._start()
                else:
                    self._attach(self.cluster.address)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the private cluster; from one that was attached to, only disconnect."""
        with contextlib.suppress(OSError):  # never made, or not empty
            self.storage.rmdir()
        self._ending.set()
        if self._started:
            # Tune leaves references to Ray's objects in cycles; whichever thread frees one between
            # two steps of the shutdown has Ray end the whole process.
            collecting = gc.isenabled()
            gc.disable()
            try:
                ray.shutdown()
            finally:
                if collecting:
                    gc.enable()
            # A cluster that is attached to later may be one of many machines.
            ray_constants.ENABLE_RAY_CLUSTER = self._joining[1]
            os.environ.pop(_JOINING, None)
            os.environ.update({_JOINING: self._joining[0]} if self._joining[0] else {})

    def _start(self) -> None:
        # Ray listens on every interface unless it thinks that nodes cannot join. Its processes
        # read the variable; this one has, when ray was imported.
        if os.environ.setdefault(_JOINING, "0") == "0":
            ray_constants.ENABLE_RAY_CLUSTER = False
        try:
            ray.init(
                address="local",
                num_cpus=self.cpus,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level=logging.ERROR,
                namespace="quest_dist",
            )
        except Exception as error:  # Ray's own are no more than that
            raise ValueError(f"cluster: Ray did not start here ({describe(error)})") from error
        if raylet := _raylet():
            threading.Thread(target=self._watch, args=(raylet,), name="raylet", daemon=True).start()

    def _watch(self, raylet: int) -> None:
        """End this process when its raylet dies: unreaped it counts as alive to all of Ray, and
        fit() would wait for its workers for ever."""
        while not self._ending.wait(1.0):
            with contextlib.suppress(ChildProcessError):
                if os.waitpid(raylet, os.WNOHANG) == (0, 0):
                    continue
            if not self._ending.is_set():
                sys.stderr.write(
                    "error: Ray's raylet died (out of memory?); what is finished is kept: the same"
                    " command goes on from here\n"
                )
                sys.stderr.flush()
                os._exit(1)

    def _attach(self, address: str) -> None:
        carried = {k: v for k, v in os.environ.items() if k.startswith(_CARRIED)}
        # A checkout on a shared disk is found by the same path; elsewhere the path does no harm.
        paths = [str(Path(quest_dist.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
        carried["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        env = {**_SETTINGS, **carried, **self.cluster.env}
        # A runtime environment stands in the cluster's logs and dashboard: no place for a secret.
        self._secrets = {name: env.pop(name) for name in list(env) if redact.is_secret(name)}
        try:
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                namespace="quest_dist",
                runtime_env={"env_vars": env},
            )
        except ConnectionError as error:
            raise ValueError(
                f"cluster.address={address}: no Ray cluster answers there, or it asks for a token,"
                f" which Ray sends to a named address only with RAY_AUTH_MODE=token ({error})"
            ) from error

    def __call__(self, current: Round, workers: Workers) -> None:
        """Run a round: every unit a trial, in the order given; one after the other where there is
        one worker, whatever else would fit.

        Raises ValueError for workers that no node could ever hold.
        """
        cpus = float(workers.cpus)
        ours = self._started and self.cluster.address is None
        if ours:
            cpus = math.floor(1000 * self.cpus / workers.count) / 1000
        self._rounds += 1
        models = by_model(current.units)
        units, at_once = list(current.units), None
        if workers.count == 1 and not ours:
            # Others' CPUs would hold a second unit. Tune then knows of one trial at a time, so that
            # those of a model must follow each other to find it loaded.
            at_once = 1
            units = sorted(units, key=lambda unit: models[unit.first.model.canonical()])
        need = {"CPU": cpus} | ({"GPU": workers.gpus} if workers.gpus else {})
        check_fits(cpus, workers.gpus, [node.resources for node in nodes.living()])
        dealing = None
        if self.cluster.node_types:
            dealer = dealer_of(current, units, self.cluster, need, at_once)
            units = [unit for unit in units if unit.key not in current.broken]
            if not units and self._rounds == 1:
                first = current.units[0]
                reason, _ = current.broken[first.key]
                raise ValueError(f"{first.first.task.name} on {first.first.model.name}: {reason}")
            if not units:
                return
            dealing = Dealing(dealer, need)
        if self.cluster.address is not None:
            self._look_at_nodes(units, need)
        # Tune copies and writes down each trial's configuration, so that is short.
        shared: dict[str, int] = {}
        config = {"unit": tune.grid_search([_brief(unit, shared) for unit in units])}
        numbers = {unit.key: models[unit.first.model.canonical()] for unit in units}

        def bundle(config: Mapping[str, Any]) -> tune.PlacementGroupFactory:
            model = numbers[key_of(config)]
            mark = config.get("mark", {})
            return tune.PlacementGroupFactory([{**need, **mark, "memory": 1024.0 * (1 + model)}])

        name = f"round-{os.getpid()}-{self._rounds}"
        tuner = tune.Tuner(
            tune.with_resources(self._evaluator(list(shared), workers), bundle),
            param_space=config,
            tune_config=tune.TuneConfig(
                reuse_actors=True,
                search_alg=dealing,
                scheduler=Replacing() if dealing is None else Dealt(dealing),
                max_concurrent_trials=at_once if dealing is None else None,
                trial_name_creator=lambda trial: f"unit-{key_of(trial.config)[:8]}",
                trial_dirname_creator=lambda trial: f"{trial.trial_id}",
            ),
            run_config=tune.RunConfig(
                name=name,
                storage_path=str(self.storage),
                verbose=0,
                callbacks=[Delivery(current), Quiet()],
                stop=Halt(current),
                failure_config=tune.FailureConfig(max_failures=0),
                checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
            ),
        )
        try:
            with _quiet():
                tuner.fit()
        except Exception:
            if current.error is None:  # else Tune met the same full disk
                raise
        finally:
            shutil.rmtree(self.storage / name, ignore_errors=True)
        reached = set(current.broken)
        for unit in current.units:
            if current.delivered.get(unit.key, set()) >= set(unit.samples):
                reached.add(unit.key)
        # An interrupted fit() returns as if all had gone well; only what arrived can tell.
        current.interrupted = len(reached) < len(current.units) and current.error is None

    def _look_at_nodes(self, units: Sequence[Unit], need: Mapping[str, float]) -> None:
        """Have the nodes that could hold a worker, and were not asked before, say whether it could
        run there."""
        new = [node for node in nodes.living() if node.id not in self._looked_at]
        able = [n for n in new if all(n.resources.get(k, 0.0) >= v for k, v in need.items())]
        nodes.check(able, nodes.paths(units))
        self._looked_at |= {node.id for node in able}

    def _evaluator(self, shared: Sequence[str], workers: Workers) -> Any:
        """What a trial calls; what all trials need reaches it through Ray's object store, which
        nobody prints, so secrets too."""
        # `import_path` lets workers find the evaluator where the driver found it (tests).
        given = {
            "shared": shared,
            "runtime": Runtime(workers.cpus, workers.gpus).to_dict(),
            "run_unit": self.run_unit,
            "import_path": [path for path in sys.path if path],
            "secrets": self._secrets,
        }
        return tune.with_parameters(evaluate, given=given)


def _brief(unit: Unit, shared: dict[str, int]) -> str:
    """A unit as JSON: what others share with it is in `shared`, which is added to."""
    whole = unit.to_dict()
    own = {name: whole.pop(name) for name in ("key", "samples")}
    place = shared.setdefault(json.dumps(whole, sort_keys=True), len(shared))
    return json.dumps({**own, "shared": place})


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Ray's own words off the screen: failures are reported once, by whoever is told of them.

    Whoever prints meanwhile must hold its own reference to the terminal.
    """
    log = logging.getLogger("ray")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        log.setLevel(level)


def evaluate(config: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Run one unit in a worker: one Tune report a sample, a last one for what broke it.

    `given` are what all units have in common, and `secrets`: environment variables that they need
    and that must not be kept anywhere.
    """
    os.environ.update(given["secrets"])
    sys.path += [path for path in given["import_path"] if path not in sys.path]
    unit = json.loads(config["unit"])
    unit |= json.loads(given["shared"][unit.pop("shared")])
    try:
        run_unit = resolve(given["run_unit"])
        for report in witnessed(run_unit, unit, given["runtime"]):
            tune.report({"report": report})
    except Exception as error:
        said = {"unit": unit["key"], "message": describe(error), "again": can_retry(error)}
        tune.report({"broken": said})
        if can_retry(error):
            raise  # a fresh process for whatever comes next


class Delivery(tune.Callback):
    """Hands what trials report to the round. Tune pickles callbacks; a round stays here."""

    def __init__(self, current: Round | None = None) -> None:
        self.current = current

    def __getstate__(self) -> dict[str, Any]:
        return {"current": None}

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Deliver a report, taking it out of the result so that Tune stores none of it."""
        report, broken = result.pop("report", None), result.pop("broken", None)
        if self.current is None:
            return
        if broken is not None:
            self.current.broken[broken["unit"]] = (broken["message"], broken["again"])
        if report is not None:
            self.current.deliver(report)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Note a unit whose process ended without saying why."""
        if self.current is not None:
            self.current.broken.setdefault(key_of(trial.config), (_last_words(trial), True))


def _last_words(trial: Any) -> str:
    """Why a trial ended, in one line."""
    error = trial.get_pickled_error()
    if error is None or isinstance(error, ray.exceptions.ActorDiedError):
        return "the worker process died (out of memory?)"
    return describe(error)[:500]


class Quiet(TrialProgressCallback):
    """Stands in for the callback that Tune would add to print a line a trial."""

    def _print(self, msg: str) -> None:
        """Print nothing."""

    def log_result(self, trial: Any, result: dict[str, Any], error: bool = False) -> None:
        """Print nothing."""


class Halt(tune.Stopper):
    """Ends the round when the driver could not take a report (a full disk, for example)."""

    def __init__(self, current: Round | None = None) -> None:
        self.current = current

    def __getstate__(self) -> dict[str, Any]:
        return {"current": None}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        """Whether the driver has failed."""
        return self.current is not None and self.current.error is not None


def _raylet() -> int | None:
    """The raylet that this process started; None where there is no /proc to tell."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            name, _, rest = path.read_text().rpartition(")")
            if name.endswith("(raylet") and int(rest.split()[1]) == os.getpid():
                return int(path.parent.name)
    return None
