"""Draw again: figures, verdicts and the report, from what a sweep left behind.

    python -m quest_dist.figures --sweep longbench_budgets        from the tracking store alone
    python -m quest_dist.figures --points outputs/passkey/points.csv

Neither the ledger nor a model is needed and nothing is run. Exit status: 0 when every figure has
all its points, 1 when some are missing (what there is, is drawn), 2 for a mistake.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from quest_dist import figures, mlflow_read
from quest_dist.report import files, launched, verdicts
from quest_dist.report.launched import Launched, Part
from quest_dist.table import from_csv

COMPLETE, INCOMPLETE, MISTAKE = 0, 1, 2
STORE = "outputs/mlflow.db"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (default: sys.argv); return the exit status."""
    chosen = _parser().parse_args(arguments)
    try:
        figures.check(chosen.figures or ())
        found = _from_points(chosen.points) if chosen.points else _from_store(chosen)
        if chosen.figures:
            found = launched.choosing(
                found, chosen.figures, lambda name, rows: bool(figures.belonging(name, rows))
            )
        return _draw(found, chosen.out or Path("redrawn") / found.name)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return MISTAKE


def _draw(found: Launched, out: Path) -> int:
    paths = files.write(found, out)
    status = COMPLETE
    for line in verdicts.lines(found):
        sys.stdout.write(f"{line.figure}: {line.verdict}: {line.reason}\n")
        if not line.file:
            status = INCOMPLETE
    if any(part.unfinished for part in found.parts if part.figures):
        status = INCOMPLETE
    if not found.figures:
        sys.stdout.write(f"{found.name} lists no figure; --figures curves draws its points\n")
    sys.stdout.write("\n".join(["", *map(str, paths), ""]))
    return status


def _from_store(chosen: argparse.Namespace) -> Launched:
    uri = chosen.tracking or os.environ.get("MLFLOW_TRACKING_URI") or STORE
    kept = mlflow_read.newest(uri, chosen.sweep)
    found = launched.read(kept.text)
    sys.stdout.write(f"sweep {kept.name}, by {kept.user or 'unknown'}, run {kept.run_id}\n")
    if kept.status == "RUNNING":
        sys.stdout.write("it is still running, or was killed: drawn is what had been logged\n")
    return found


def _from_points(path: Path) -> Launched:
    """The launch whose points a file holds: with all that is known of it where launch.json lies
    beside it, else its rows alone, with every figure that they belong in."""
    folder = path.parent
    if path.name == "points.csv" and (folder / launched.FILE).is_file():
        return launched.read(lambda name: (folder / name).read_text(encoding="utf-8"))
    rows = tuple(from_csv(path))
    own = [name for name in figures.NAMES if not name.startswith(("curves", "pareto"))]
    names = [name for name in own if figures.belonging(name, rows)]
    part = Part(path.stem, tuple(names) or ("curves",), rows)
    return Launched(path.stem, (part,))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m quest_dist.figures",
        description="Draw figures, verdicts and the report again; nothing is run.",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--tracking",
        metavar="URI",
        help=f"MLflow's store, a URI or a database (default: MLFLOW_TRACKING_URI, else {STORE})",
    )
    source.add_argument(
        "--points", type=Path, metavar="CSV", help="draw from a table of points instead"
    )
    parser.add_argument("--sweep", metavar="NAME", help="which sweep (default: the newest)")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="where to (default: redrawn/NAME)"
    )
    parser.add_argument(
        "--figures", nargs="+", metavar="NAME", help="only these (default: all of the sweep)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
