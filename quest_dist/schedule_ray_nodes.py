"""The nodes of a Ray cluster that was attached to: what they have, and whether units can run there.

Every node that can hold a worker is asked, before the first unit and before any round that finds
new ones: does it import this quest_dist, and does it see what the units name on disk? Workers read
models and data there; they write nothing, so `output_dir` need not be shared. A node that joins in
the middle of a round is asked before the next one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import quest_dist
from quest_dist.plan import Unit

ANSWER_SECONDS = 120.0
#: Of a folder's files, at most so many are compared; weights are a few, a data set's maybe more.
MOST_FILES = 2000


@dataclass(frozen=True)
class Node:
    """A living node: Ray's id of it, its address, and its resources."""

    id: str
    address: str
    resources: Mapping[str, float]


def living() -> list[Node]:
    """Every living node."""
    found: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [Node(n["NodeID"], n["NodeManagerAddress"], n["Resources"]) for n in found if n["Alive"]]


def paths(units: Sequence[Unit]) -> list[str]:
    """The files and folders that units name by absolute path, and that are on this machine."""
    groups = (g for unit in units for g in (unit.first.model, unit.first.task, unit.first.data))
    settings = {json.dumps(g.to_dict(), sort_keys=True) for g in groups}
    named = {text for each in settings for text in _texts(json.loads(each))}
    places = [text for text in named if text[:1] in ("/", "~") and len(Path(text).parts) > 1]
    return sorted(place for place in places if Path(place).expanduser().exists())


def check(nodes: Sequence[Node], places: Sequence[str]) -> None:
    """Raise ValueError, naming the node and what to do, unless each can run units."""
    wanted = seen(places)
    asked = {
        ray.remote(num_cpus=0, max_retries=0)(_answer)
        .options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False))
        .remote(list(places)): node
        for node in nodes
    }
    ready, silent = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_SECONDS)
    for task in ready:
        name = f"node {asked[task].address}"
        try:
            version, code, found = ray.get(task)
        except Exception as error:
            if not _lives(asked[task]):
                continue  # it was dying: its units go elsewhere
            last = str(error).strip().splitlines()[-1]
            raise ValueError(
                f"cluster: {name} cannot import quest_dist ({last}); install it there, or put the"
                " checkout on a disk that it sees under the same path"
            ) from error
        if (version, code) != (quest_dist.__version__, digest_of_code()):
            raise ValueError(
                f"cluster: {name} has quest_dist {version} of other code ({code}) than this driver"
                f" ({quest_dist.__version__}, {digest_of_code()}); install the same on both"
            )
        for place in places:
            if found[place] != wanted[place]:
                lacks = "does not see" if found[place] is None else "sees something else at"
                raise ValueError(
                    f"cluster: {name} {lacks} {place}, which units read; mount the same disk"
                    " there, or copy it to the same path"
                )
    for task in silent:
        if not _lives(asked[task]):
            continue
        raise ValueError(
            f"cluster: node {asked[task].address} did not answer within {ANSWER_SECONDS:g} s;"
            " look at its raylet's log, or stop it"
        )


def _lives(node: Node) -> bool:
    return node.id in {each.id for each in living()}


def _answer(places: list[str]) -> tuple[str, str, dict[str, str | None]]:
    """What a node says of itself. Sent to it whole, for it may have no quest_dist to find it in."""
    import quest_dist

    try:
        from quest_dist.schedule_ray_nodes import digest_of_code, seen
    except ImportError:  # older
        return quest_dist.__version__, "unknown", {}
    return quest_dist.__version__, digest_of_code(), seen(places)


def digest_of_code(package: Path = Path(__file__).parent) -> str:
    """Eight digits that any change to a package's sources changes, by default this one's."""
    found = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        found.update(str(path.relative_to(package)).encode() + path.read_bytes())
    return found.hexdigest()[:8]


def seen(places: Sequence[str]) -> dict[str, str | None]:
    """What is at each path: a digest of the names and sizes of its files; None: nothing."""
    return {place: _listing(Path(place).expanduser()) for place in places}


def _listing(path: Path) -> str | None:
    if not path.exists():
        return None
    listed: list[tuple[str, int]] = []
    for folder, folders, names in [("", [], [""])] if path.is_file() else os.walk(path):
        folders.sort()  # the same ones first on every node
        for name in sorted(names):
            file = path / folder / name
            size = file.stat().st_size if file.exists() else -1  # a link to nothing
            listed.append((str(file.relative_to(path)), size))
        if len(listed) > MOST_FILES:
            break
    return hashlib.sha256(json.dumps(listed[:MOST_FILES]).encode()).hexdigest()[:16]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _texts(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _texts(each)
