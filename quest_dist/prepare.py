"""Prepare: a configuration becomes points whose every name, number and file has been checked.

All that can be known to be wrong is found here, as one ValueError, before a worker starts: names,
settings, budgets that a method cannot honour, data that is missing or malformed.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from quest_dist import artefacts, cluster, figures, matched, models, plan, redact, task_models
from quest_dist.cluster import Cluster
from quest_dist.plan import Point, Spec
from quest_dist.search import Search
from quest_dist.suggest import did_you_mean
from quest_dist.tasks.task import Task

_CHOSEN = ("model", "method", "task")
#: Schemes of the addresses that MLflow's own stores have; plugins add theirs.
_STORES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks", "uc")


@dataclass(frozen=True)
class Part:
    """A sweep's points, with the samples of each by key, and the figures that they are for."""

    name: str
    about: str
    figures: tuple[str, ...]
    points: tuple[Point, ...]
    counts: Mapping[str, int]
    search: Search


@dataclass(frozen=True)
class Sweep:
    """A checked sweep: one part, or several in one launch (see quest_dist.parts), whose points are
    run once however many parts they are in. `counts` and `metrics` map a point's key to its samples
    and metric; `exclusive` are the keys of points that are times, and run alone on their device.
    """

    name: str
    about: str
    output_dir: Path
    parts: tuple[Part, ...]
    points: tuple[Point, ...]
    counts: Mapping[str, int]
    metrics: Mapping[str, str]
    exclusive: frozenset[str]
    cluster: Cluster
    tracking: Mapping[str, Any]
    config: Mapping[str, Any]

    def asking(self, ledger: matched.Records, tried: Mapping[str, int]) -> Sweep:
        """This sweep with the counts that the ledger must hold next (see matched.asked)."""
        parts = []
        counts: dict[str, int] = {}
        for part in self.parts:
            wanted = matched.asked(
                part.search, part.points, part.counts, self.exclusive, ledger, tried
            )
            parts.append(replace(part, counts=wanted))
            counts |= {key: max(n, counts.get(key, 0)) for key, n in wanted.items()}
        return replace(self, parts=tuple(parts), counts=counts)

    @property
    def directory(self) -> Path:
        """Where this sweep's tables and figures go."""
        return self.output_dir / self.name


def prepare(config: Mapping[str, Any]) -> Sweep:
    """Check a configuration (plain JSON, as compose.plain gives it) and expand its grid.

    Raises ValueError, naming the setting and the choices.
    """
    grid = config["grid"]
    limit = config["limit"]
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: must be at least 1 sample, or null for all")
    check_name(config["name"])
    figures.check(config["figures"])
    resources = Cluster(**config["cluster"])
    cluster.check(resources)
    search = Search(**config["search"])
    search.check()
    _check_tracking(config["tracking"])
    specs = {group: specs_of(config[group], group) for group in _CHOSEN}
    _check_chosen(config)
    plan.check_grid(grid, specs)
    _check_models(specs["model"], grid["model"], cluster.device_of(resources))
    for name in grid["model"]:
        specs["model"][name] = _identified(specs["model"][name])
    protocol = protocol_of(config["protocol"])
    tasks, data = _tasks(config, specs["task"], protocol)
    for name, task in tasks.items():
        named = specs["task"][name]
        specs["task"][name] = task_models.identified(named, task, cluster.device_of(resources))
    points = plan.points(grid, config["exclude"], specs, data, protocol)
    points = _timed_by_shape(_with_artefacts(points), tasks)
    _check_lengths(points, tasks)
    task_models.check(points, tasks)
    _check_methods(points, tasks, resources)
    metrics = {p.key: tasks[p.task.name].metric for p in points}
    if search.delta is not None:
        matched.check(points, metrics)
    samples = {name: task.count() for name, task in tasks.items()}
    counts = {p.key: min(samples[p.task.name], limit or samples[p.task.name]) for p in points}
    name, about = str(config["name"]), redact.text(str(config["about"]))
    return Sweep(
        name=name,
        about=about,
        output_dir=output_dir(config),
        parts=(Part(name, about, tuple(config["figures"]), tuple(points), counts, search),),
        points=tuple(points),
        counts=counts,
        metrics=metrics,
        exclusive=frozenset(p.key for p in points if tasks[p.task.name].exclusive),
        cluster=resources,
        tracking=config["tracking"],
        config=config,
    )


def output_dir(config: Mapping[str, Any]) -> Path:
    """Where a configuration's results go. Raises ValueError where that is left empty."""
    if not str(config["output_dir"]).strip():
        raise ValueError("output_dir is empty: name a folder ('.' for the current one)")
    return Path(config["output_dir"]).expanduser().absolute()


def check_name(name: object) -> None:
    """Raise ValueError unless a sweep's name can name a folder."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", str(name)):
        raise ValueError(f"name={name!r}: letters, digits, '.', '_' and '-' only")


def specs_of(options: Mapping[str, Any], group: str) -> dict[str, Spec]:
    """Return the specs of a group whose options are loaded under their names."""
    for name, settings in options.items():
        if not isinstance(settings, Mapping):
            raise ValueError(
                f"{group}.{name}: not an option of {group}; choose options in the grid, as in"
                f" 'grid.{group}=[NAME]'"
            )
        for key, value in settings.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{group}.{name}.{key}={value}: expected a finite number")
    return {name: Spec(name, settings) for name, settings in options.items()}


def protocol_of(settings: Mapping[str, Any]) -> Spec:
    """Return the protocol; its `dense_layers` has reached the grid and is each point's own."""
    content = {key: value for key, value in settings.items() if key != "dense_layers"}
    return plan.with_content(_named(settings, "protocol"), content)


def _check_chosen(config: Mapping[str, Any]) -> None:
    """Explain an empty grid, and `model=NAME` where `grid.model=[NAME]` was meant."""
    grid = config["grid"]
    if not any(grid[group] for group in (*_CHOSEN, "budget")):
        raise ValueError("no sweep: add +sweep=NAME, or fill grid.model, task, method and budget")
    for group in _CHOSEN:
        options = list(config[group])
        if len(options) == 1 and set(grid[group]) - set(options):
            raise ValueError(
                f"grid.{group}={grid[group]}, but {group}={options[0]} loads no other {group};"
                f" to choose, give 'grid.{group}=[{options[0]}]' instead"
            )


def _check_tracking(settings: Mapping[str, Any]) -> None:
    """A store that does not answer may come back; one that MLflow has no way to reach will not."""
    if not settings["enabled"]:
        return
    of_environment = os.environ.get("MLFLOW_TRACKING_URI")
    uri = str(of_environment or settings["uri"] or "")
    said = f"{'MLFLOW_TRACKING_URI' if of_environment else 'tracking.uri'}={redact.text(uri)}"
    scheme = urlsplit(uri).scheme.partition("+")[0]
    if not uri or scheme in _STORES:
        return
    if scheme in ("", "file"):
        if os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() not in ("true", "1"):
            raise ValueError(
                f"{said}: MLflow keeps no runs in a folder unless MLFLOW_ALLOW_FILE_STORE=true;"
                " choose sqlite:////path/to/mlflow.db, or the http address of a server"
            )
    elif scheme not in entry_points(group="mlflow.tracking_store").names:
        raise ValueError(f"{said}: no store of MLflow; {did_you_mean(scheme, _STORES)}")


def _named(settings: Mapping[str, Any], group: str) -> Spec:
    return Spec(str(settings.get("label", group)), settings)


def _check_models(specs: Mapping[str, Spec], names: Sequence[str], device: str) -> None:
    for name in names:
        try:
            models.check(specs[name].settings, device)
        except ValueError as error:
            raise ValueError(str(error).replace("model.", f"model.{name}.", 1)) from error


def _identified(spec: Spec) -> Spec:
    return plan.with_content(spec, models.identity(spec.settings))


def _tasks(
    config: Mapping[str, Any], specs: Mapping[str, Spec], protocol: Spec
) -> tuple[dict[str, Task], dict[str, Spec]]:
    """The tasks of the grid, built, and the data that each reads."""
    source = _named(config["data"], "data")
    try:
        records = source.build()
    except ValueError as error:
        raise ValueError(f"data: {error}") from error
    tasks: dict[str, Task] = {}
    data: dict[str, Spec] = {}
    for name in config["grid"]["task"]:
        try:
            task = specs[name].build(data=records, seed=0, protocol=dict(protocol.settings))
            if Task not in type(task).__mro__:
                raise ValueError(f"{type(task).__name__} is no Task of quest_dist.tasks.task")
            count = task.count()
            read = replace(source, name=task.made_of) if task.made_of else source
            data[name] = plan.with_content(read, task.identity())
        except ValueError as error:
            # A class says `task.length` of the option that it is given for.
            own = "|".join(map(re.escape, specs[name].settings))
            text = re.sub(rf"\btask\.(?=(?:{own})\b)", f"task.{name}.", str(error))
            raise ValueError(f"task {name}: {text}") from error
        if count < 1:
            raise ValueError(f"task {name}: there are no samples")
        tasks[name] = task
    return tasks, data


def _with_artefacts(points: Sequence[Point]) -> list[Point]:
    """The points, with what methods need made from the model in their identities, by content."""
    known: dict[str, Spec] = {}
    found: dict[str, Point] = {}
    for point in points:
        both = plan.canonical([point.model.canonical(), point.method.canonical()])
        if both not in known:
            _method(point.method)  # what is wrong with its settings is said as everywhere
            try:
                known[both] = artefacts.identified(point.method, point.model.identity)
            except ValueError as error:
                raise ValueError(f"method {point.method.name}: {error}") from error
        point = replace(point, method=known[both])
        found.setdefault(point.key, point)
    return list(found.values())


def _timed_by_shape(points: Sequence[Point], tasks: Mapping[str, Task]) -> list[Point]:
    """The points, with the shape as the identity of a model whose weights are not needed."""
    found: dict[str, Point] = {}
    for point in points:
        if not tasks[point.task.name].needs_weights:
            try:
                content = models.shape_identity(point.model.settings)
                tasks[point.task.name].check_model(point.model.settings["shape"])
            except ValueError as error:
                text = str(error).removeprefix("model.")
                name = f"model.{point.model.name}.{text}"
                raise ValueError(f"task {point.task.name}: {name}") from error
            point = replace(point, model=plan.with_content(point.model, content))
        found.setdefault(point.key, point)
    return list(found.values())


def _check_lengths(points: Sequence[Point], tasks: Mapping[str, Task]) -> None:
    for point in points:
        needs = tasks[point.task.name].needs()
        # null: the worker learns it by loading
        holds = point.model.settings.get("max_length")
        if needs is not None and holds is not None and needs > holds:
            raise ValueError(
                f"task {point.task.name}: a sample takes {needs} tokens, more than"
                f" model.{point.model.name}.max_length={holds}"
            )


def _check_methods(points: Sequence[Point], tasks: Mapping[str, Task], resources: Cluster) -> None:
    built: dict[str, Any] = {}
    device = cluster.device_of(resources)
    for point in points:
        name = point.method.name
        if name not in built:
            built[name] = _method(point.method)
        shape = point.model.settings.get("shape") or {}
        layers = shape.get("layers")
        if layers is not None and point.dense_layers > layers:
            raise ValueError(
                f"grid.dense_layers={point.dense_layers}: {point.model.name} has {layers} layers"
            )
        try:
            built[name].check_backend(
                device, point.model.identity.get("dtype"), shape.get("head_dim")
            )
            built[name].check_layers(point.budget, point.page_size)
            tasks[point.task.name].check_method(built[name])
        except ValueError as error:
            raise ValueError(f"method {name}: {error}") from error


def _method(spec: Spec) -> Any:
    try:
        return spec.build()
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(spec.name) else f"{spec.name}: {text}") from error
