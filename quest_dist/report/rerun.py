"""Rerun: the command that computes one point of a launch again.

The launch's own command, followed by the grid cut to the point (in Hydra the last value given
counts) and a fresh output folder: the point's key is then the same, and its records are new.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from quest_dist.report.launched import Part
from quest_dist.table import Row

FOLDER = "outputs/again"
#: Axes of the grid that are named only where a part has several values of them.
OTHERS = ("model", "page_size", "dense_layers", "seed")


def overrides(row: Row, rows: Sequence[Row]) -> list[str]:
    """What cuts the grid of `rows` to one row, and to full attention, which it is compared with."""
    methods = ["full", row.method] if any(r.method == "full" for r in rows) else [row.method]
    chosen: dict[str, object] = {
        axis: getattr(row, axis)
        for axis in OTHERS
        if len({getattr(other, axis) for other in rows}) > 1
    }
    chosen |= {"task": row.task, "method": ",".join(dict.fromkeys(methods))}
    if row.budget is not None:
        chosen["budget"] = row.budget
    return [f"grid.{axis}=[{value}]" for axis, value in chosen.items()]


def command(row: Row, part: Part) -> str:
    """The command for one row; empty where the part has none."""
    if not part.command:
        return ""
    given = [*overrides(row, part.rows), f"output_dir={FOLDER}"]
    return " ".join([part.command, *map(shlex.quote, given)])


def example(part: Part) -> tuple[str, str]:
    """A row's name and its command: of the last row with a budget, else of the last."""
    rows = [row for row in part.rows if row.budget is not None] or list(part.rows)
    if not rows or not part.command:
        return "", ""
    row = rows[-1]
    budget = "" if row.budget is None else f" at {row.budget}"
    return f"{row.label}{budget} on {row.task_label}", command(row, part)
