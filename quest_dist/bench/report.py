"""What a benchmark gives: a table for people, and JSON for machines.

The JSON's `summary` holds the accepted figures by name.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from quest_dist.machine_state import processor


@dataclass(frozen=True)
class Report:
    """A benchmark's `rows` under `columns`, its `summary`, and the `setting` that it ran in.

    `targets` says of some figures of the summary what is accepted, as in ">= 6".
    """

    name: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    summary: Mapping[str, Any]
    setting: Mapping[str, Any]
    targets: Mapping[str, str] = field(default_factory=dict)

    def show(self) -> None:
        """Print the table and the summary."""
        table = Table(title=self.name, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for number, column in enumerate(self.columns):
            table.add_column(column, justify="left" if number == 0 else "right")
        for row in self.rows:
            table.add_row(*(_text(value) for value in row))
        console = Console()
        unbounded = console.options.update(width=1000)
        console.width = max(100, console.width, console.measure(table, options=unbounded).maximum)
        console.print(table)
        for key, value in self.summary.items():
            target = f" (target {self.targets[key]})" if key in self.targets else ""
            console.print(f"{key}: {_text(value)}{target}", highlight=False)

    def write(self, path: Path) -> None:
        """Write everything as JSON; the folder is made if need be."""
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [dict(zip(self.columns, row, strict=True)) for row in self.rows]
        content = {
            "benchmark": self.name,
            "machine": machine(),
            "setting": dict(self.setting),
            "rows": rows,
            "summary": dict(self.summary),
            "targets": dict(self.targets),
        }
        path.write_text(json.dumps(content, indent=1) + "\n")


def machine() -> dict[str, Any]:
    """The processor, its logical CPUs in use, and the system."""
    return {
        "processor": processor(),
        "cpus": os.cpu_count(),
        "system": platform.platform(),
    }


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
