"""Welcome: what the command prints when it is not told which sweep to run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def headline(path: Path) -> str:
    """Return the first sentence of a sweep file's header comment."""
    with path.open(encoding="utf-8") as file:
        first = file.readline().strip()
    return first.lstrip("# ").rstrip(".") if first.startswith("#") else ""


def text(sweeps: Mapping[str, Path]) -> str:
    """Return the explanation: what this is, which sweeps there are, examples, where results go."""
    width = max((len(name) for name in sweeps), default=0)
    listed = "\n".join(f"  +sweep={name:<{width}}  {headline(p)}" for name, p in sweeps.items())
    folder = os.path.commonpath([*map(str, sweeps.values())]) if sweeps else ""
    folder = str(Path(folder).parent if folder.endswith(".yaml") else folder)
    return f"""quest_dist.sweep runs KV-cache methods over a grid of models, tasks and budgets.

Sweeps ({folder}):
{listed}

Try
  python -m quest_dist.sweep +sweep=smoke                          see everything work
  python -m quest_dist.sweep +sweep=passkey plan=true              what would run, and for how long
  python -m quest_dist.sweep +sweep=passkey 'grid.budget=[64,256]' limit=3
  python -m quest_dist.sweep +sweep=longbench_budgets profile=paper

The same command again goes on where the last one stopped; a wider grid runs only what is new.
Results: outputs/<sweep>/ (table, figures), outputs/ledger.db (every answer), and MLflow:
  mlflow ui --backend-store-uri sqlite:///outputs/mlflow.db

All options: --help. The whole configuration: --cfg job."""
