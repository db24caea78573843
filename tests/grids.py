"""Small points and units for the tests of planning and scheduling."""

from __future__ import annotations

from typing import Any

from quest_dist import plan
from quest_dist.plan import Point, Spec, Unit

PROTOCOL = Spec("quest_paper", {"tail": "question"})


def specs() -> dict[str, dict[str, Spec]]:
    return {
        "model": {n: Spec(n, {"weights": n}) for n in ("small", "large")},
        "task": {n: Spec(n, {"dataset": n}) for n in ("qasper", "hotpotqa")},
        "method": {
            "full": Spec("full", {"label": "Full", "budgeted": False}),
            "quest": Spec("quest", {"label": "Quest", "radius_scale": 1.0}),
            "h2o": Spec("h2o", {"label": "H2O", "recent_share": 0.5}),
        },
    }


def grid(**lists: Any) -> dict[str, list[Any]]:
    base: dict[str, list[Any]] = {
        "model": ["small"],
        "task": ["qasper"],
        "method": ["full", "quest"],
        "budget": [64, 128],
        "page_size": [16],
        "dense_layers": [2],
        "seed": [0],
    }
    return base | lists


def points(**lists: Any) -> list[Point]:
    known = specs()
    data = {name: Spec("generated", {"digest": name}) for name in known["task"]}
    return plan.points(grid(**lists), [], known, data, PROTOCOL)


def units(found: list[Point], samples: int, size: int = 4) -> list[Unit]:
    counts = {point.key: samples for point in found}
    return plan.units(found, counts, lambda key: set(), lambda row: size)
