"""Node types: which kind of node each unit of work goes to (no heavy imports).

Where `cluster.node_types` names the kinds of a cluster's nodes, a unit is bound to a kind when a
place there gets free, or is about to: list scheduling over all that is left, in the order given,
each unit to the place where it would end first. So long ones go to fast nodes and none is so long
on a slow one that all wait for it. Which node of the kind, and when it has room, is Ray's to say.

Invariants:
* A unit is bound to no kind whose device is too small for it by estimate.
* Nothing is bound to a kind without living nodes, but for a unit that no living one can hold and
  for which there is nothing else to wait for: that waits for a node.
* A kind has at most one unit a place in waiting, so that what is dealt last is dealt to whoever
  really is fast.
"""

from __future__ import annotations

import heapq
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from quest_dist.suggest import did_you_mean

GIB = 2**30
#: Of a kind's resource that a unit takes: a mark, not a share.
MARK = 0.001


@dataclass
class NodeType:
    """A kind of node. `resource` is the Ray resource that all its nodes have and no other, its own
    `accelerator_type:...` or one given to `ray start --resources`; `speed` how fast it is beside
    the other kinds; `memory_gib` what a worker's device holds there (null: not known, any unit).
    """

    resource: str = ""
    speed: float = 1.0
    memory_gib: float | None = None


@dataclass(frozen=True)
class Load:
    """A unit as it is dealt: its key, seconds on a node of speed 1, bytes (0: not known), model."""

    key: str
    seconds: float
    bytes: int
    model: int


@dataclass
class _Bound:
    """A load at a kind: since when a worker has it (None: it waits for one)."""

    load: Load
    kind: str
    since: float | None = None


def read(settings: Mapping[str, Any]) -> dict[str, NodeType]:
    """Node types out of plain JSON; ValueError names what is none of their settings."""
    keys = [each.name for each in fields(NodeType)]
    for name, values in settings.items():
        place = f"cluster.node_types.{name}"
        if not isinstance(values, Mapping):
            raise ValueError(f"{place}={values!r}: give it {', '.join(keys)}")
        for key in values:
            if key not in keys:
                raise ValueError(f"{place}.{key}: no such setting; {did_you_mean(key, keys)}")
    return {name: NodeType(**values) for name, values in settings.items()}


def check(types: Mapping[str, NodeType]) -> None:
    """Raise ValueError for kinds that cannot be told from each other, or that nothing can be."""
    for name, kind in types.items():
        place = f"cluster.node_types.{name}"
        if not isinstance(kind.resource, str) or not kind.resource:
            raise ValueError(
                f"{place}.resource is empty: name the Ray resource that marks its nodes, as in"
                " accelerator_type:H100"
            )
        if kind.resource in ("CPU", "GPU", "memory", "object_store_memory"):
            raise ValueError(f"{place}.resource={kind.resource}: nodes of every type have that")
        for key in ("speed", "memory_gib"):
            value = getattr(kind, key)
            if key == "memory_gib" and value is None:
                continue
            if not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise ValueError(f"{place}.{key}={value!r}: must be a number above 0")
    marks = Counter(kind.resource for kind in types.values())
    for resource, times in marks.items():
        if times > 1:
            raise ValueError(f"cluster.node_types: {times} of them have the resource {resource}")


def room(kind: NodeType, gpus: float) -> int | None:
    """Bytes that a worker with so many GPUs can have on a node of a kind; None: not known."""
    return None if kind.memory_gib is None else int(kind.memory_gib * GIB * (gpus or 1.0))


def largest(types: Mapping[str, NodeType], gpus: float) -> int | None:
    """Bytes of the largest worker that any of these kinds can hold; None: not known."""
    rooms = [room(kind, gpus) for kind in types.values()]
    return None if not rooms or None in rooms else max(r for r in rooms if r is not None)


def places(
    types: Mapping[str, NodeType], need: Mapping[str, float], nodes: Sequence[Mapping[str, float]]
) -> dict[str, int]:
    """How many workers that each `need` so much the nodes of each kind hold, others left out."""
    return {
        name: sum(_workers(node, need) for node in nodes if node.get(kind.resource, 0.0) > 0)
        for name, kind in types.items()
    }


def _workers(node: Mapping[str, float], need: Mapping[str, float]) -> int:
    return int(min(node.get(name, 0.0) / amount + 1e-6 for name, amount in need.items() if amount))


@dataclass
class Dealer:
    """Deals loads to kinds of nodes, one at a time, as their places get free.

    `gpus` are a worker's; `at_once`: so many loads at once on all kinds together (None: as many as
    there are places, and as many in waiting).
    """

    types: Mapping[str, NodeType]
    left: list[Load]
    gpus: float = 0.0
    at_once: int | None = None
    now: Callable[[], float] = time.monotonic
    _bound: dict[str, _Bound] = field(default_factory=dict)

    def homeless(self, alive: Mapping[str, int]) -> Iterator[Load]:
        """The loads that no kind with places can hold."""
        for load in self.left:
            if not any(n and self._holds(name, load) for name, n in alive.items()):
                yield load

    def deal(self, alive: Mapping[str, int]) -> tuple[Load, str] | None:
        """The next load and its kind, or None: wait. `alive` are the places of each kind now."""
        if self.at_once is not None and len(self._bound) >= self.at_once:
            return None
        for name in sorted(alive, key=lambda name: -self.types[name].speed):
            bound = sum(each.kind == name for each in self._bound.values())
            ahead = 1 if self.at_once is not None else 2
            if bound < ahead * alive[name] and (load := self._for(name, bound, alive)):
                return self._bind(load, name)
        if self._bound or not self.left:
            return None
        for load in self.left:  # a node that holds it may still come
            for name in sorted(self.types, key=lambda name: -self.types[name].speed):
                if self._holds(name, load):
                    return self._bind(load, name)
        return None

    def began(self, key: str) -> None:
        """A worker has taken a load up."""
        if key in self._bound and self._bound[key].since is None:
            self._bound[key].since = self.now()

    def ended(self, key: str) -> None:
        """A load is done with, whatever became of it."""
        self._bound.pop(key, None)

    def stranded(self, alive: Mapping[str, int]) -> Iterator[str]:
        """The loads that wait for a kind that has no nodes any more while another could hold them;
        `take_back` makes them be dealt again."""
        for key, each in self._bound.items():
            others = (n and self._holds(name, each.load) for name, n in alive.items())
            if each.since is None and not alive.get(each.kind) and any(others):
                yield key

    def take_back(self, key: str) -> None:
        """Deal a load again, before all others."""
        self.left.insert(0, self._bound.pop(key).load)

    def _bind(self, load: Load, name: str) -> tuple[Load, str]:
        self.left.remove(load)
        self._bound[load.key] = _Bound(load, name)
        return load, name

    def _holds(self, name: str, load: Load) -> bool:
        most = room(self.types[name], self.gpus)
        return most is None or load.bytes <= most

    def _for(self, name: str, bound: int, alive: Mapping[str, int]) -> Load | None:
        """The load for a kind's next place: of a model that its workers have loaded and of which
        none waits there, if there is one that should go there; else of any."""
        here = [each for each in self._bound.values() if each.kind == name]
        running = Counter(each.load.model for each in here if each.since is not None)
        running.subtract(each.load.model for each in here if each.since is None)
        loaded = {model for model, n in running.items() if n > 0}
        own = [load for load in self.left if load.model in loaded]
        soon = bound >= alive[name]
        return (self._listed(name, own, alive, soon) if own else None) or self._listed(
            name, self.left, alive, soon
        )

    def _listed(
        self, name: str, left: Sequence[Load], alive: Mapping[str, int], soon: bool
    ) -> Load | None:
        """The first load that list scheduling gives a kind: now, or, if `soon`, at any time."""
        free = {kind: self._free(kind, n) for kind, n in alive.items() if n}
        for load in left:
            ends = [
                (heap[0] + load.seconds / self.types[kind].speed, kind)
                for kind, heap in free.items()
                if self._holds(kind, load)
            ]
            if not ends:
                continue
            end, kind = min(ends)
            if kind == name and (soon or not free[kind][0]):
                return load
            heapq.heapreplace(free[kind], end)
        return None

    def _free(self, kind: str, count: int) -> list[float]:
        """Seconds until each place of a kind is free, a heap: what overran its estimate is
        expected to take as long again as it has overrun."""
        heap = [0.0] * count
        here = [each for each in self._bound.values() if each.kind == kind]
        for each in sorted(here, key=lambda each: each.since is None):
            seconds = each.load.seconds / self.types[kind].speed
            if each.since is not None:
                seconds = abs(seconds - (self.now() - each.since)) or 1e-3
            heapq.heapreplace(heap, heap[0] + seconds)
        return heap
