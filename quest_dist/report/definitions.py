"""Definitions: what methods and statistics say of themselves in their docstrings, read as text.

Nothing is said twice: the report's definitions are the docstrings of the modules that computed,
taken from their source without importing it (methods import torch).
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterable
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from quest_dist.spec import PRESENTATION, Spec

STATISTICS, VERDICTS = "quest_dist.stats", "quest_dist.figures.paper"


class Block(NamedTuple):
    """A paragraph, or lines that keep their shape (formulas, tables)."""

    text: str
    shaped: bool


@cache
def docstring(module: str) -> str:
    """The docstring of a module's source; empty where there is no source."""
    found = importlib.util.find_spec(module)
    if found is None or not found.origin or not found.origin.endswith(".py"):
        return ""
    source = Path(found.origin).read_text(encoding="utf-8")
    return ast.get_docstring(ast.parse(source)) or ""


def methods(specs: Iterable[Spec]) -> dict[str, dict[str, str]]:
    """Label, settings and definition of each method, by name."""
    found = {}
    for spec in specs:
        module = str(spec.settings.get("_target_", "")).rpartition(".")[0]
        shown = {k: v for k, v in spec.settings.items() if k not in PRESENTATION | {"_target_"}}
        found[spec.name] = {
            "label": spec.label,
            "settings": ", ".join(f"{name} {value}" for name, value in shown.items()),
            "text": docstring(module) if module else "",
        }
    return found


def blocks(text: str) -> list[Block]:
    """A docstring as paragraphs and as indented lines that keep their shape."""
    found = []
    for paragraph in text.split("\n\n"):
        for shaped, group in groupby(paragraph.splitlines(), lambda line: line.startswith("    ")):
            lines = [line.removeprefix("    ").rstrip() for line in group]
            found.append(Block(("\n" if shaped else " ").join(lines), shaped))
    return [block for block in found if block.text]
