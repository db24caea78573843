"""A whole sweep on the tiny unit: the real configuration, planning, ledger, tables; no model.

As a program: `python tiny_sweep.py OUTPUT_DIR [override ...]`, in this process unless an override
says otherwise.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from quest_dist import closing, compose, launch, sweep
from quest_dist.ledger import Ledger
from quest_dist.plan import Point
from quest_dist.prepare import prepare

GRID = (
    "name=tiny",
    "grid.model=[tiny]",
    "grid.task=[passkey]",
    "grid.method=[full,quest]",
    "grid.budget=[64,128]",
    "task.passkey.samples=6",
    "tracking=none",
    "cluster=inline",
    "cluster.samples_per_unit=2",
)


def config(output_dir: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Compose the grid with a local model of a few bytes: enough for all checks before a run."""
    folder = output_dir.parent / "tiny_model"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"tiny")
    model = f"+model.tiny={{source:local,path:{folder},label:Tiny}}"
    return compose.composed([*GRID, model, f"output_dir={output_dir}", *overrides])


def run(output_dir: Path, *overrides: str, out: Console | None = None) -> int:
    out = out or Console(file=io.StringIO(), width=120)
    return launch.run(config(output_dir, overrides), run_unit="tiny_unit:run", out=out)


def points(output_dir: Path, *overrides: str) -> tuple[Point, ...]:
    return prepare(config(output_dir, overrides)).points


def contents(output_dir: Path, found: Sequence[Point]) -> dict[str, list[dict[str, Any]]]:
    """The finished records of points, by key."""
    with Ledger(output_dir / "ledger.db") as ledger:
        return {p.key: [r for r in ledger.records(p.key) if not r["error"]] for p in found}


def table(output_dir: Path) -> str:
    return (output_dir / "tiny" / "points.csv").read_text()


if __name__ == "__main__":
    sys.exit(
        sweep.in_one_line(lambda: run(Path(sys.argv[1]), *sys.argv[2:], out=closing.console()))
    )
