"""Launched: what a launch was and what came of it, as texts that can be read back.

`launch.json` holds what no row carries: the command, hardware, commit, environment, the methods'
definitions, and which figures each part draws; a part's rows are a CSV beside it. Both are in the
folder of results and in the tracking store, so that figures, verdicts and report are made again
from either, byte by byte, without the ledger.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from quest_dist.table import Row, from_csv, to_csv

FILE = "launch.json"
VERSION = 1


@dataclass(frozen=True)
class Part:
    """Figures and the rows that they are drawn from; `command` runs what is missing of them."""

    name: str
    figures: tuple[str, ...]
    rows: tuple[Row, ...]
    command: str = ""
    about: str = ""

    @property
    def unfinished(self) -> tuple[Row, ...]:
        """Rows that lack samples or failed."""
        return tuple(row for row in self.rows if row.status != "finished")

    @property
    def date(self) -> str:
        """The day (UTC) of the newest record; empty without one."""
        return date(self.rows)


@dataclass(frozen=True)
class Launched:
    """A launch. `source`: git commit, branch and repository; `environment`: versions by name;
    `methods`: each method's label, settings and definition, as `definitions.methods` gives them."""

    name: str
    parts: tuple[Part, ...]
    about: str = ""
    command: str = ""
    hardware: str = ""
    source: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    methods: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def rows(self) -> tuple[Row, ...]:
        """The rows of all parts; of a point that several have, the one with most samples."""
        found: dict[str, Row] = {}
        for row in (row for part in self.parts for row in part.rows):
            if row.point not in found or row.n_expected > found[row.point].n_expected:
                found[row.point] = row
        return tuple(found.values())

    @property
    def figures(self) -> tuple[str, ...]:
        """The figures of all parts."""
        return tuple(dict.fromkeys(name for part in self.parts for name in part.figures))

    @property
    def commit(self) -> str:
        """The commit, short; '+' at its end says that there were changes on top of it."""
        full = self.source.get("commit", "")
        return full[:12] + "+" * (full.endswith("+") and len(full) > 12)


def date(rows: Iterable[Row]) -> str:
    """The day (UTC) of the newest record of the rows; empty without one."""
    newest = max((r.finished_at for r in rows if not math.isnan(r.finished_at)), default=None)
    return "" if newest is None else time.strftime("%Y-%m-%d", time.gmtime(newest))


def texts(launched: Launched) -> dict[str, str]:
    """The files that hold a launch, by their paths in its folder: launch.json and CSVs."""
    files = {"points.csv": to_csv(launched.rows)}
    files |= {_path(launched, part): to_csv(part.rows) for part in launched.parts}
    facts = {
        "version": VERSION,
        "name": launched.name,
        "about": launched.about,
        "command": launched.command,
        "hardware": launched.hardware,
        "source": dict(launched.source),
        "environment": dict(launched.environment),
        "methods": {name: dict(said) for name, said in launched.methods.items()},
        "parts": [
            {
                "name": part.name,
                "about": part.about,
                "command": part.command,
                "figures": list(part.figures),
                "points": _path(launched, part),
            }
            for part in launched.parts
        ],
    }
    return {**files, FILE: json.dumps(facts, indent=1, ensure_ascii=False) + "\n"}


def read(file: Callable[[str], str]) -> Launched:
    """The launch whose texts `file` returns by path; ValueError where they are not what we write.

    `file` may raise whatever says that there is no such text.
    """
    try:
        facts = json.loads(file(FILE))
        if facts["version"] != VERSION:
            raise ValueError(f"{FILE}: version {facts['version']}; this quest_dist reads {VERSION}")
        parts = tuple(_part(made, file) for made in facts["parts"])
        known = {k: v for k, v in facts.items() if k not in ("version", "parts")}
        return Launched(parts=parts, **known)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{FILE}: not as quest_dist writes it ({error!r})") from error


def _part(made: Mapping[str, Any], file: Callable[[str], str]) -> Part:
    path = str(made["points"])
    try:
        rows = tuple(from_csv(file(path)))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return Part(made["name"], tuple(made["figures"]), rows, made["command"], made["about"])


def _path(launched: Launched, part: Part) -> str:
    return "points.csv" if len(launched.parts) == 1 else f"points/{part.name}.csv"


def choosing(
    launched: Launched, names: Sequence[str], takes: Callable[[str, Sequence[Row]], bool]
) -> Launched:
    """The launch with these figures only; `takes` says whether rows belong in a figure.

    A figure is drawn by the parts that list it, else by those with rows of it; one without any
    stays with the first part, which says that it was not run.
    """
    chosen: dict[int, list[str]] = {}
    for name in names:
        places = [i for i, part in enumerate(launched.parts) if name in part.figures]
        if not places:
            places = [i for i, part in enumerate(launched.parts) if takes(name, part.rows)][:1]
        for place in places or [0]:
            chosen.setdefault(place, []).append(name)
    parts = [replace(p, figures=tuple(chosen.get(i, ()))) for i, p in enumerate(launched.parts)]
    return replace(launched, parts=tuple(parts))
