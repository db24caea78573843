"""Parts: several sweeps as one launch, which runs what they share once.

Each part is prepared from its own configuration (see compose.parts) and keeps its name, figures and
number of samples; where, how and how many at once is what the launch says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quest_dist import redact
from quest_dist.cluster import Cluster
from quest_dist.prepare import Sweep, check_name, output_dir, prepare


def combined(config: Mapping[str, Any], parts: Sequence[Mapping[str, Any]]) -> Sweep:
    """The sweep of all `parts`, as `config` names and places it.

    Raises ValueError for what is wrong with a part, which it names.
    """
    check_name(config["name"])
    prepared = [_prepared(part) for part in parts]
    points = {point.key: point for sweep in prepared for point in sweep.points}
    counts: dict[str, int] = {}
    metrics: dict[str, str] = {}
    for sweep in prepared:
        metrics |= sweep.metrics
        for key, count in sweep.counts.items():
            counts[key] = max(count, counts.get(key, 0))
    return Sweep(
        name=str(config["name"]),
        about=redact.text(str(config["about"])),
        output_dir=output_dir(config),
        parts=tuple(part for sweep in prepared for part in sweep.parts),
        points=tuple(points.values()),
        counts=counts,
        metrics=metrics,
        exclusive=frozenset().union(*(sweep.exclusive for sweep in prepared)),
        cluster=Cluster(**config["cluster"]),
        tracking=config["tracking"],
        config=config,
    )


def _prepared(config: Mapping[str, Any]) -> Sweep:
    try:
        return prepare(config)
    except ValueError as error:
        raise ValueError(f"part {config['name']}: {error}") from error
