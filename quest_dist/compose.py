"""Compose: the Hydra configuration of a sweep, checked, as plain dictionaries.

This module and `sweep` are the only ones that know Hydra and OmegaConf; `DictConfig` ends here.
`model`, `method` and `task` hold all options of their folders (one top-level key a file), through
an option `all` that is generated from the folder when the command starts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, Node, OmegaConf
from omegaconf.errors import (
    InterpolationKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from quest_dist import mistakes, redact
from quest_dist.cluster import Cluster
from quest_dist.folders import find
from quest_dist.search import Search
from quest_dist.suggest import did_you_mean

#: Groups whose every option is loaded, and chosen from by name in the grid.
OPEN_GROUPS = ("model", "method", "task")
_LOGGING = ("hydra_logging", "job_logging")
#: Where a configuration may ask for a secret of the environment: it is handed on and never kept.
_SECRETS_GO_TO = ("cluster.env.", "tracking.uri")


@dataclass
class Grid:
    """The lists whose product is the sweep."""

    model: list[str] = field(default_factory=list)
    task: list[str] = field(default_factory=list)
    method: list[str] = field(default_factory=list)
    budget: list[int] = field(default_factory=list)
    page_size: list[int] = field(default_factory=list)
    dense_layers: list[int] = field(default_factory=list)
    seed: list[int] = field(default_factory=list)


@dataclass
class Tracking:
    """Settings of MLflow; None: a database in the output directory, an experiment a sweep."""

    enabled: bool = True
    uri: str | None = None
    experiment: str | None = None


@dataclass
class Config:
    """The whole configuration. Fields of type Any are open: their files say what they hold."""

    name: str = "adhoc"
    about: str = ""
    limit: int | None = None
    output_dir: str = "outputs"
    plan: bool = False
    figures: list[str] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    grid: Grid = field(default_factory=Grid)
    exclude: list[Any] = field(default_factory=list)
    search: Search = field(default_factory=Search)
    model: dict[str, Any] = field(default_factory=dict)
    method: dict[str, Any] = field(default_factory=dict)
    task: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=dict)
    profile: dict[str, Any] = field(default_factory=dict)
    cluster: Cluster = field(default_factory=Cluster)
    tracking: Tracking = field(default_factory=Tracking)


def sweep_files() -> dict[str, Path]:
    """Return the files of the sweeps by name."""
    return {path.stem: path for path in sorted(find("sweeps").glob("*.yaml"))}


def options(group: str, folders: Sequence[Path]) -> list[str]:
    """Return the names of a group's options over several configuration folders."""
    found = {path.stem for folder in folders for path in (folder / group).glob("*.yaml")}
    return sorted(found - {"all"})


def register(arguments: Sequence[str] = ()) -> None:
    """Put schema, sweeps and the `all` options into Hydra's store.

    `arguments` are the command line's: folders named by `hydra.searchpath` there add options.
    """
    OmegaConf.register_new_resolver("oc.env", _environment, replace=True)
    store = ConfigStore.instance()
    store.store(name="schema", node=Config, provider="quest_dist")
    for name, path in sweep_files().items():
        try:
            node = OmegaConf.load(path)
        except Exception as error:
            raise ValueError(
                f"{path}: not readable as YAML: {' '.join(str(error).split())}"
            ) from None
        store.store(
            group="sweep", name=name, node=node, package="_global_", provider=f"sweeps/{path.name}"
        )
    folders = [find("conf"), *_searchpath(arguments)]
    for group in OPEN_GROUPS:
        names = options(group, folders)
        store.store(group=group, name="all", node={"defaults": names}, provider="quest_dist")


def plain(cfg: DictConfig) -> dict[str, Any]:
    """Return the configuration as plain JSON, checked against the schema.

    Raises ValueError for a value that is not set and for keys that a `+` override invented.
    """
    try:
        container = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise ValueError(f"{error.full_key} is not set: give it as {error.full_key}=...") from None
    except InterpolationKeyError as error:
        raise ValueError(f"{error.full_key}: {_one_line(str(error.msg).splitlines()[0])}") from None
    except OmegaConfBaseException as error:
        raise ValueError(_one_line(str(error))) from None
    assert isinstance(container, dict)
    result = {str(key): value for key, value in container.items()}
    for path, key, valid in _extras(result, Config):
        raise ValueError(f"unknown setting '{path}{key}'; {did_you_mean(key, valid)}")
    return result


def text(cfg: DictConfig) -> str:
    """Return the configuration as YAML; environment variables stay names, so it holds no secret."""
    return OmegaConf.to_yaml(cfg, resolve=False)


def defaults() -> dict[str, Any]:
    """Return the configuration without overrides, unresolved; its keys are the valid names."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(find("conf"))):
        container = OmegaConf.to_container(compose(config_name="config"), resolve=False)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def composed(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the checked configuration that a command line with these overrides would run.

    Raises ValueError, in one line, for whatever Hydra finds wrong with them.
    """
    return composed_with_text(overrides)[0]


def composed_with_text(overrides: Sequence[str]) -> tuple[dict[str, Any], str]:
    """Return the checked configuration, and the same as `text` gives it.

    Nothing that a file sets under `hydra` is acted on: Hydra's own command would call what
    `hydra.callbacks` or a handler of `hydra.job_logging` names.
    """
    register(overrides)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(find("conf"))):
            cfg = compose(config_name="config", overrides=list(overrides))
            return plain(cfg), text(cfg)
    except mistakes.ERRORS as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        raise ValueError(mistakes.explain(error, defaults)) from None


def check_printable(overrides: Sequence[str]) -> None:
    """Raise ValueError where a file sets what Hydra acts on even when it only prints."""
    register(overrides)
    GlobalHydra.instance().clear()
    folder = find("conf")
    with initialize_config_dir(version_base="1.3", config_dir=str(folder)):
        found = compose(config_name="config", overrides=list(overrides), return_hydra_config=True)
    own = {name: OmegaConf.load(folder / f"hydra/{name}/quest.yaml") for name in _LOGGING}
    for name, value in {"callbacks": OmegaConf.create({}), **own}.items():
        if found.hydra[name] != value:
            raise ValueError(f"hydra.{name} is set: a configuration has nothing called by Hydra")


def parts(config: Mapping[str, Any], overrides: Sequence[str]) -> list[dict[str, Any]]:
    """The configurations of the sweeps that `config.parts` names, each as the command line with
    these overrides would give it; none for a sweep without parts.

    Raises ValueError for a part that is no sweep, or has parts itself.
    """
    found = []
    own = re.compile(r"\+*sweep=|name=|about=|parts=")
    shared = [override for override in overrides if not own.match(override)]
    names = sweep_files()
    for name in config["parts"]:
        if name not in names:
            raise ValueError(f"parts: no sweep '{name}'; {did_you_mean(name, names)}")
        part = composed([f"+sweep={name}", *shared])
        if part["parts"]:
            raise ValueError(f"parts: sweep '{name}' has parts itself")
        found.append(part)
    return found


def _extras(
    values: Mapping[str, Any], schema: type, path: str = ""
) -> Iterator[tuple[str, str, list[str]]]:
    """Yield (path, key, valid keys) for keys that the schema lacks."""
    known = {f.name: f for f in fields(schema)}
    for key, value in values.items():
        if key not in known:
            yield path, key, list(known)
            continue
        factory = known[key].default_factory
        nested = factory if factory is not MISSING and is_dataclass(factory) else None
        if isinstance(nested, type) and isinstance(value, Mapping):
            yield from _extras(value, nested, f"{path}{key}.")


_UNSET: Any = object()


def _environment(name: str, default: Any = _UNSET, *, _node_: Node) -> str | None:
    """OmegaConf's `oc.env`, less the secrets: whoever wrote a file of the configuration could
    otherwise have them kept with the results."""
    place = str(_node_._get_full_key(None))
    if redact.is_secret(name) and not place.startswith(_SECRETS_GO_TO):
        raise ValueError(f"{place}: {name} holds a secret, which only cluster.env may be given")
    found = os.environ.get(name)
    if found is not None:
        return found
    if default is _UNSET:
        raise KeyError(f"Environment variable '{name}' not found")
    return None if default is None else str(default)


def _searchpath(arguments: Sequence[str]) -> list[Path]:
    """The folders that `hydra.searchpath` names. Hydra would pass over one that is not there."""
    found = []
    for argument in arguments:
        if not argument.startswith("hydra.searchpath="):
            continue
        try:
            named = OverridesParser.create().parse_override(argument).value()
        except HydraException:
            continue  # said where all overrides are read
        for entry in named if isinstance(named, list) else []:
            folder = Path(str(entry).removeprefix("file://"))
            if "pkg:" in str(entry):
                continue
            if not folder.is_dir():
                raise ValueError(f"hydra.searchpath: '{entry}' is not a folder")
            found.append(folder)
    return found


def _one_line(text: str) -> str:
    return " ".join(text.split())
