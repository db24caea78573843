"""Launches that never ran: parts of synthetic rows, for everything that reports on them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import synthetic_sweep as synthetic

from quest_dist.report.launched import Launched, Part
from quest_dist.table import Row

FEW = {"methods": ("full", "quest", "h2o"), "budgets": (256, 512)}
COMMAND = "python -m quest_dist.sweep +sweep=longbench_budgets"


def rows(folder: Path, *tasks: str, n: int = 6) -> tuple[Row, ...]:
    """Finished rows of tasks."""
    return tuple(synthetic.sweep(folder, synthetic.points(tasks, **FEW), n))


def launch(*parts: Part, name: str = "longbench", about: str = "Scores by budget") -> Launched:
    """A launch of parts with everything known of it."""
    return Launched(
        name,
        parts,
        about,
        COMMAND,
        "Some CPU, 2 cores",
        {"commit": "0123456789abcdef"},
        {"Python": "3.11.9", "kernels": "avx2"},
        {
            "quest": {
                "label": "Quest",
                "settings": "gqa max",
                "text": "A `page` bound.\n\n    q . c",
            }
        },
    )


def longbench(folder: Path) -> Part:
    """A finished part with Figure 7."""
    return Part("longbench", ("fig07",), rows(folder / "a", "qasper", "hotpotqa"), COMMAND)


def passkey(folder: Path) -> Part:
    """A part with a failed and a missing point, and a figure that it has no point of."""
    found = list(rows(folder / "b", "passkey"))
    unknown = dict.fromkeys(("score", "low", "high", "delta", "delta_low", "delta_high"), math.nan)
    found[1] = replace(found[1], n=0, status="failed", error="ValueError: <b> & 'c'", **unknown)
    found[2] = replace(found[2], n=0, status="missing", **unknown)
    command = "python -m quest_dist.sweep +sweep=passkey"
    return Part("passkey", ("table1", "fig06"), tuple(found), command)
