"""Points and units: what a sweep computes, named by content (standard library only).

A `Point` is one dot of one figure; a `Unit` is the set of points and samples that one worker
runs together, because they share one loaded model and one prefill of each sample.

Invariants:
* A point's key is a hash of everything that can change its score and of nothing else: labels,
  colours, paths, hardware and the number of samples are not in it. Equal keys mean equal work.
* Units cover every missing (point, sample) pair exactly once and contain no finished pair.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from quest_dist.spec import Spec, canonical, digest, with_content
from quest_dist.suggest import did_you_mean

__all__ = ["Point", "Spec", "Unit", "canonical", "digest", "points", "units", "with_content"]

#: Raised when the meaning of a point changes without its settings changing.
IDENTITY_VERSION = 1
#: Lists of the grid, outermost loop first.
AXES = ("model", "task", "method", "budget", "page_size", "dense_layers", "seed")


@dataclass(frozen=True)
class Point:
    """One dot of one figure. `budget` is tokens a query may attend to; None: no budget."""

    model: Spec
    task: Spec
    data: Spec
    method: Spec
    protocol: Spec
    budget: int | None
    page_size: int
    dense_layers: int
    seed: int

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that can change this point's score, as plain JSON.

        Models, tasks and methods carry their names, which name the curve a reader sees; data
        and protocol go by content alone, so that a moved folder is still the same data.
        """
        named = {
            group: {"name": spec.name, **spec.identity}
            for group, spec in (("model", self.model), ("task", self.task), ("method", self.method))
        }
        identity = {
            "version": IDENTITY_VERSION,
            **named,
            "data": self.data.identity,
            "protocol": self.protocol.identity,
            "budget": self.budget,
            "page_size": self.page_size,
            "dense_layers": self.dense_layers,
            "seed": self.seed,
        }
        return dict(json.loads(canonical(identity)))

    @cached_property
    def key(self) -> str:
        """The point's name in ledger, MLflow and CSV: 16 hexadecimal digits."""
        return digest(self.identity)

    @cached_property
    def family(self) -> str:
        """Points of one family can share a unit: same model, task, data, protocol, pages, seed."""
        identity = self.identity
        shared = ("model", "task", "data", "protocol", "page_size", "seed")
        return digest({name: identity[name] for name in shared})

    @cached_property
    def ground(self) -> str:
        """What points share that can be compared with the same full: a family but for its pages."""
        identity = self.identity
        return digest([identity[name] for name in ("model", "task", "data", "protocol", "seed")])

    def __hash__(self) -> int:
        return hash(self.key)

    def __str__(self) -> str:
        budget = "" if self.budget is None else f" b{self.budget}"
        return f"{self.method.name}{budget} · {self.task.name} · {self.model.name}"


@dataclass(frozen=True)
class Unit:
    """Points of one family and the samples to run them on; every point runs every sample."""

    points: tuple[Point, ...]
    samples: tuple[int, ...]

    @cached_property
    def key(self) -> str:
        """The unit's name: a hash of its points' keys and its samples."""
        return digest({"points": [p.key for p in self.points], "samples": list(self.samples)})

    @property
    def first(self) -> Point:
        """A point that stands for what all points of the unit share."""
        return self.points[0]

    def to_dict(self) -> dict[str, Any]:
        """Return the unit as plain JSON (it travels through Ray)."""
        first = self.first
        groups = ("model", "task", "data", "protocol")
        shared: dict[str, Any] = {name: getattr(first, name).to_dict() for name in groups}
        shared |= {"page_size": first.page_size, "seed": first.seed}
        rows = [
            {"method": p.method.to_dict(), "budget": p.budget, "dense_layers": p.dense_layers}
            for p in self.points
        ]
        return {"key": self.key, **shared, "points": rows, "samples": list(self.samples)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Unit:
        """Return the unit that `to_dict` wrote."""
        shared = {n: Spec.from_dict(data[n]) for n in ("model", "task", "data", "protocol")}
        points = tuple(
            Point(
                **shared,
                method=Spec.from_dict(row["method"]),
                budget=row["budget"],
                page_size=data["page_size"],
                dense_layers=row["dense_layers"],
                seed=data["seed"],
            )
            for row in data["points"]
        )
        return cls(points, tuple(data["samples"]))


def points(
    grid: Mapping[str, Sequence[Any]],
    exclude: Sequence[Mapping[str, Any]],
    specs: Mapping[str, Mapping[str, Spec]],
    data: Mapping[str, Spec],
    protocol: Spec,
) -> list[Point]:
    """Expand a grid into its points, in grid order, duplicates merged by key.

    `specs` maps model, task and method to their named specs; `data` maps a task's name to the
    data it reads. A rule of `exclude` drops the combinations that match all its fields (a
    value or a list). Methods without a budget give one point instead of one per budget.
    Raises ValueError for unknown names, empty lists, bad numbers and rules.
    """
    check_grid(grid, specs)
    rules = [_rule(rule, specs) for rule in exclude]
    found: dict[str, Point] = {}
    # A grid of full alone needs no budget; any number stands for it here.
    lists = [grid[axis] or ([0] if axis == "budget" else []) for axis in AXES]
    for values in itertools.product(*lists):
        chosen = dict(zip(AXES, values, strict=True))
        if any(all(chosen[k] in allowed for k, allowed in rule.items()) for rule in rules):
            continue
        method = specs["method"][chosen["method"]]
        point = Point(
            model=specs["model"][chosen["model"]],
            task=specs["task"][chosen["task"]],
            data=data[chosen["task"]],
            method=method,
            protocol=protocol,
            budget=chosen["budget"] if method.budgeted else None,
            page_size=chosen["page_size"],
            dense_layers=chosen["dense_layers"],
            seed=chosen["seed"],
        )
        found.setdefault(point.key, point)
    if not found:
        raise ValueError("exclude: the rules leave no point of the grid")
    return list(found.values())


def units(
    points: Iterable[Point],
    counts: Mapping[str, int],
    done: Callable[[str], set[int]],
    samples_per_unit: Callable[[tuple[Point, ...]], int],
    seconds: Callable[[Unit], float] = lambda unit: float(len(unit.samples) * len(unit.points)),
) -> list[Unit]:
    """Group the missing (point, sample) pairs into units, longest first.

    `counts` maps a point's key to its number of samples, `done` to the samples that are
    finished; `samples_per_unit` gives the slice length for a set of points and `seconds` the
    estimate by which units are ordered.
    """
    families: dict[str, dict[int, list[Point]]] = {}
    for point in points:
        missing = families.setdefault(point.family, {})
        finished = done(point.key)
        for sample in range(counts[point.key]):
            if sample not in finished:
                missing.setdefault(sample, []).append(point)
    result: list[Unit] = []
    for missing in families.values():
        slices: dict[tuple[str, ...], tuple[tuple[Point, ...], list[int]]] = {}
        for sample in sorted(missing):
            row = tuple(missing[sample])
            slices.setdefault(tuple(p.key for p in row), (row, []))[1].append(sample)
        for row, samples in slices.values():
            size = max(1, samples_per_unit(row))
            result += [Unit(row, part) for part in _even(samples, size)]
    return sorted(result, key=seconds, reverse=True)


def check_grid(grid: Mapping[str, Sequence[Any]], specs: Mapping[str, Mapping[str, Spec]]) -> None:
    """Raise ValueError unless every list of the grid holds valid names or whole numbers."""
    for axis in AXES:
        values = grid.get(axis) or ()
        if axis == "budget" and not any(specs["method"][m].budgeted for m in grid["method"]):
            continue
        if not values:
            hint = f"; choose from {', '.join(sorted(specs[axis]))}" if axis in specs else ""
            raise ValueError(f"grid.{axis} is empty: give it at least one value{hint}")
        for value in values:
            if axis in specs:
                if value not in specs[axis]:
                    hint = did_you_mean(value, specs[axis])
                    raise ValueError(f"grid.{axis}: unknown {axis} '{value}'; {hint}")
            else:
                least = 0 if axis in ("seed", "dense_layers") else 1
                most = 2**63 - 1 if axis == "seed" else 2**31 - 1  # what stores and kernels hold
                if not isinstance(value, int) or isinstance(value, bool) or value < least:
                    raise ValueError(
                        f"grid.{axis}: expected whole numbers of at least {least}, got {value!r}"
                    )
                if value > most:
                    raise ValueError(f"grid.{axis}: expected at most {most}, got {value}")


def _rule(
    rule: Mapping[str, Any], specs: Mapping[str, Mapping[str, Spec]]
) -> dict[str, tuple[Any, ...]]:
    if not rule:
        raise ValueError("exclude: an empty rule would drop every point")
    if not isinstance(rule, Mapping):
        raise ValueError(f"exclude: {rule!r} is no rule; expected one as in {{method: h2o}}")
    checked: dict[str, tuple[Any, ...]] = {}
    for axis, value in rule.items():
        if axis not in AXES:
            raise ValueError(f"exclude: no such field '{axis}'; {did_you_mean(axis, AXES)}")
        values = tuple(value) if isinstance(value, list | tuple) else (value,)
        for name in values if axis in specs else ():
            if name not in specs[axis]:
                hint = did_you_mean(name, specs[axis])
                raise ValueError(f"exclude: unknown {axis} '{name}'; {hint}")
        checked[axis] = values
    return checked


def _even(samples: Sequence[int], size: int) -> Iterator[tuple[int, ...]]:
    """Cut samples into slices of at most `size`, of nearly equal length."""
    parts = -(-len(samples) // size)
    for i in range(parts):
        yield tuple(samples[len(samples) * i // parts : len(samples) * (i + 1) // parts])
