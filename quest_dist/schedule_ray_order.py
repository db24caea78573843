"""Which unit next, told to Ray Tune: in order, and where `cluster.node_types` are named, by them.

Tune asks a search algorithm for trials and a scheduler for the one that a free worker takes.
Without node types all trials are there from the start and go anywhere; with them `Dealing` hands
one out when `node_types.Dealer` binds it to a kind of node, which it then asks of Ray as a
resource.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ray.tune.schedulers import FIFOScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator

from quest_dist.cluster import Cluster
from quest_dist.cost import needs
from quest_dist.node_types import GIB, MARK, Dealer, Load, places, room
from quest_dist.plan import Unit
from quest_dist.schedule import Round, by_model
from quest_dist.schedule_ray_nodes import living

REPLACEMENT_SECONDS = 120.0  # that a unit waits, at most, for the worker which starts for it
_LOOK_SECONDS = 1.0  # between two looks at the nodes


class Replacing(FIFOScheduler):
    """Units in order, but none that a new worker is being started for.

    Tune alone would hand that unit to whichever worker ends first and stop the one that starts: a
    lost worker would never be replaced where units end faster than workers start.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._most = 0  # workers at once, as far as seen
        self._since: dict[str, float] = {}  # trial -> when it was first left to a new worker

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """The first waiting unit beyond those that workers are being started for."""
        trials = tune_controller.get_trials()
        running = sum(trial.status == "RUNNING" for trial in trials)
        self._most = max(self._most, running)
        starting = self._most - running - 1  # one place is the asking worker's own
        waiting = [trial for trial in trials if trial.status == "PENDING"]
        return self.beyond(waiting, starting)

    def beyond(self, waiting: list[Any], starting: int) -> Any:
        """The first of the waiting ones after as many as workers are starting for."""
        now = time.monotonic()
        for trial in waiting[: max(0, starting)]:
            if now - self._since.setdefault(trial.trial_id, now) > REPLACEMENT_SECONDS:
                return trial  # its worker does not come
        return next(iter(waiting[max(0, starting) :]), None) or next(iter(waiting), None)


class Dealing(BasicVariantGenerator):
    """Hands out trials as a dealer binds their units to kinds of nodes.

    `need` are the resources of a worker, whatever the kind.
    """

    def __init__(self, dealer: Dealer, need: Mapping[str, float]) -> None:
        super().__init__()
        self.dealer, self._need = dealer, need
        self._trials: dict[str, Any] = {}  # by unit: those not handed out
        self._units: dict[str, str] = {}  # trial -> unit
        self.groups: dict[str, tuple[str, int]] = {}  # trial -> kind and model: one kind of worker
        self._alive = self._places()
        self._looked = self._asked = 0.0  # when at the nodes, when in vain for a unit
        self._changed = False  # the nodes, since `recall`

    def __reduce__(self) -> tuple[Any, ...]:
        return BasicVariantGenerator, ()  # Tune keeps a copy of its settings, which nothing reads

    def save_to_dir(self, dirpath: str, session_str: str = "", **_: Any) -> None:
        """Nothing to keep: what is left is what the ledger lacks."""

    def is_finished(self) -> bool:
        """Whether every unit was handed out."""
        return bool(self._units) and not self.dealer.left

    def next_trial(self) -> Any:
        """The next trial, bound to a kind of node; None: wait."""
        if not self._units:
            while (trial := super().next_trial()) is not None:  # type: ignore[no-untyped-call]
                self._keep(trial)
        self._look()
        if time.monotonic() - self._asked < _LOOK_SECONDS:
            return None
        dealt = self.dealer.deal(self._alive)
        if dealt is None:
            self._asked = time.monotonic()
            return None
        load, kind = dealt
        trial = self._trials.pop(load.key)
        # Tune asks for a trial's resources once it has it.
        trial.config = {**trial.config, "mark": {self.dealer.types[kind].resource: MARK}}
        self.groups[trial.trial_id] = kind, load.model
        return trial

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Free a unit's place."""
        super().on_trial_complete(trial_id, result, error)
        self.dealer.ended(self._units[trial_id])
        self._asked = 0.0

    def began(self, trial: Any) -> None:
        """A worker has taken a trial up."""
        self.dealer.began(self._units[trial.trial_id])

    def recall(self, controller: Any) -> None:
        """Take back what waits for a kind whose nodes are all gone while others can hold it."""
        self._look()
        if not self._changed:
            return
        self._changed = False
        trials = controller.get_trials()
        waiting = {self._units[t.trial_id]: t for t in trials if t.status == "PENDING"}
        for key in list(self.dealer.stranded(self._alive)):
            if (trial := waiting.get(key)) is not None:
                self.dealer.take_back(key)
                self._keep(trial.reset())
                controller.stop_trial(trial)

    def _keep(self, trial: Any) -> None:
        unit = key_of(trial.config)
        self._trials[unit], self._units[trial.trial_id] = trial, unit

    def _places(self) -> dict[str, int]:
        return places(self.dealer.types, self._need, [node.resources for node in living()])

    def _look(self) -> None:
        """Look at the nodes, now and then."""
        if time.monotonic() - self._looked < _LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        alive = self._places()
        if alive != self._alive:
            self._alive, self._changed, self._asked = alive, True, 0.0


class Dealt(Replacing):
    """`Replacing` among workers of one kind and model, which alone can stand in for each other."""

    def __init__(self, dealing: Dealing) -> None:
        super().__init__()
        self._dealing = dealing
        self._highest: Counter[tuple[str, int]] = Counter()
        self._before: Counter[tuple[str, int]] = Counter()

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """The first waiting unit, beyond those that workers start for, of where one got free."""
        self._dealing.recall(tune_controller)
        groups = self._dealing.groups
        running: Counter[tuple[str, int]] = Counter()
        waiting: dict[tuple[str, int], list[Any]] = {}
        for trial in tune_controller.get_trials():
            if trial.status == "RUNNING":
                running[groups[trial.trial_id]] += 1
                self._dealing.began(trial)
            elif trial.status == "PENDING":
                waiting.setdefault(groups[trial.trial_id], []).append(trial)
        freed = [group for group in waiting if running[group] < self._before[group]]
        self._before = running
        self._highest |= running
        group = next(iter(freed or waiting), None)
        if group is None:
            return None
        return self.beyond(waiting[group], self._highest[group] - running[group] - 1)


def key_of(config: Mapping[str, Any]) -> str:
    """The key of a trial's unit."""
    return str(json.loads(config["unit"])["key"])


def dealer_of(
    current: Round,
    units: Sequence[Unit],
    cluster: Cluster,
    need: Mapping[str, float],
    at_once: int | None,
) -> Dealer:
    """What deals the units to kinds of nodes, for workers that `need` so much each.

    Units that none of the living nodes can hold are broken for good. Raises ValueError where no
    node is of any kind.
    """
    types, gpus, models = cluster.types, need.get("GPU", 0.0), by_model(current.units)
    alive = places(types, need, [node.resources for node in living()])
    if not any(alive.values()):
        marks = ", ".join(f"{name} ({kind.resource})" for name, kind in types.items())
        raise ValueError(
            f"cluster.node_types: no living node with room for a worker is one of {marks};"
            f" {len(living())} nodes live"
        )
    loads = [
        Load(
            unit.key,
            current.seconds(unit),
            needs(unit) if cluster.check_memory else 0,
            models[unit.first.model.canonical()],
        )
        for unit in units
    ]
    dealer = Dealer(types, loads, gpus, at_once)
    for load in list(dealer.homeless(alive)):
        most, name = max((room(types[n], gpus) or 0, n) for n, count in alive.items() if count)
        reason = (
            f"not begun: cluster.node_types: needs {load.bytes / GIB:.1f} GiB a worker by estimate,"
            f" and the largest nodes here, {name}, hold {most / GIB:.1f};"
            " cluster.check_memory=false tries it all the same"
        )
        current.broken[load.key] = reason, False
        dealer.left.remove(load)
    return dealer
