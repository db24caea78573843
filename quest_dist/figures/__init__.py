"""Figures: pure functions from the table of points to a picture and its data.

`draw(name, rows, directory, caption)` writes <name>.png, <name>.pdf and <name>.csv; the CSV holds
exactly what was plotted, with the verdict on each point. Partial tables draw what they have and say
what is missing. matplotlib is imported by the modules of this folder only, and only when drawing.
A figure is a module of this folder, named fig*, table*, pareto* or `curves`, with `takes(row)` and
`draw(rows, caption)`, and `verdicts(rows)` where it is judged otherwise than point by point.
`python -m quest_dist.figures` draws again what a tracking store or a table of points holds.
"""

from __future__ import annotations

import csv
import importlib
import math
import pkgutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quest_dist.suggest import did_you_mean
from quest_dist.table import Row

if TYPE_CHECKING:
    from quest_dist.figures.caption import Caption
    from quest_dist.figures.paper import Verdict

NAMES = tuple(
    module.name
    for module in pkgutil.iter_modules(__path__)
    if module.name.startswith(("fig", "table", "curves", "pareto"))
)

#: What kinds of data are called wherever a number stands.
BADGES = {
    "random_keys": "random keys and values",
    "random_weights": "random weights, keys and values",
    "generated": "generated data",
    "files": "data from files",
    "hub": "hub data",
}


def check(names: Iterable[str]) -> None:
    """Raise ValueError for a figure that does not exist, before anything is run for it."""
    for name in names:
        if name not in NAMES:
            raise ValueError(f"figures: no figure '{name}'; {did_you_mean(name, NAMES)}")


@dataclass(frozen=True)
class Drawn:
    """A figure on disk: its PNG, PDF and CSV, and the words above and below the picture."""

    name: str
    paths: tuple[Path, ...]
    title: str
    small_print: str


def belonging(name: str, rows: Iterable[Row]) -> list[Row]:
    """The rows that belong in a figure."""
    check([name])
    module: Any = importlib.import_module(f"quest_dist.figures.{name}")
    return [row for row in rows if module.takes(row)]


def draw(
    name: str, rows: Sequence[Row], directory: Path, caption: Caption | None = None
) -> list[Path]:
    """Draw a figure from the rows that belong in it; return its PNG, PDF and CSV.

    No file is written, and the list is empty, when no row belongs in the figure.
    """
    found = drawn(name, rows, directory, caption)
    return list(found.paths) if found else []


def drawn(
    name: str, rows: Sequence[Row], directory: Path, caption: Caption | None = None
) -> Drawn | None:
    """As `draw`, with the figure's words; None when no row belongs in it."""
    taken = belonging(name, rows)
    if not taken:
        return None
    module = importlib.import_module(f"quest_dist.figures.{name}")
    style = importlib.import_module("quest_dist.figures.style")
    captions = importlib.import_module("quest_dist.figures.caption")
    with style.styled():
        figure, plotted = module.draw(taken, caption or captions.Caption())
        paths: list[Path] = style.save(figure, directory, name)
    data = directory / f"{name}.csv"
    _write(data, plotted)
    return Drawn(name, (*paths, data), *captions.words(figure))


def verdicts(name: str, rows: Sequence[Row]) -> dict[str, Verdict]:
    """How a figure stands to the paper, by the name of each of its parts that the paper has.

    Most figures have one part, under their own name; Figure 8 has fig08a, fig08b, fig08_topk.
    """
    from quest_dist.figures import paper

    taken = belonging(name, rows)
    module: Any = importlib.import_module(f"quest_dist.figures.{name}")
    if hasattr(module, "verdicts"):
        return dict(module.verdicts(taken))
    return {name: paper.overall(name, taken)}


def _write(path: Path, plotted: Sequence[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        if not plotted:
            return
        writer = csv.DictWriter(file, list(plotted[0]), lineterminator="\n")
        writer.writeheader()
        for line in plotted:
            writer.writerow({key: _cell(value) for key, value in line.items()})


def _cell(value: object) -> object:
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else value
