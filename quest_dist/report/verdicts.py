"""Verdicts: how each figure of a launch stands to the paper, one line a part of a figure.

Invariants: every figure that a part lists has a line, also one that was not drawn, whose reason
names what is missing and the command that runs it; an incomplete figure says so.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

import yaml

from quest_dist import figures
from quest_dist.folders import find
from quest_dist.report.launched import Launched, Part
from quest_dist.table import Row

FILE = "verdicts.csv"
NOT_RUN = "not run"


@dataclass(frozen=True)
class Line:
    """One line of verdicts.csv. `n`: samples a point, as text; `file`: the PNG, empty if none."""

    figure: str
    verdict: str
    reason: str
    n: str
    file: str


def lines(launched: Launched) -> list[Line]:
    """The lines of a launch's figures, in the order of its parts."""
    return [line for part in launched.parts for name in part.figures for line in _of(name, part)]


def to_csv(found: Sequence[Line]) -> str:
    """The lines as CSV text, one header line."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in fields(Line)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(line) for line in found)
    return text.getvalue()


def of_the_paper(found: Sequence[Line]) -> bool:
    """Whether any line is of a figure or table that the paper has."""
    return any(line.figure.startswith(("fig", "table")) for line in found)


def counted(rows: Sequence[Row]) -> str:
    """Samples a point over rows that have any: '10', '3 to 10', or '0'."""
    counts = sorted({row.n for row in rows if row.n}) or [0]
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def command_of(figure: str) -> str:
    """The command of the sweep whose file lists a figure; empty where none does."""
    for path in sorted(find("sweeps").glob("*.yaml")):
        if figure in (yaml.safe_load(path.read_text(encoding="utf-8")).get("figures") or ()):
            return f"python -m quest_dist.sweep +sweep={path.stem}"
    return ""


def _of(name: str, part: Part) -> list[Line]:
    rows = figures.belonging(name, part.rows)
    if not rows:
        command = command_of(name)
        how = f"to run it: {command}" if command else "no sweep lists it"
        return [Line(name, NOT_RUN, f"{part.name} has no point of it; {how}", "0", "")]
    found = figures.verdicts(name, rows)
    lines = []
    for figure, said in found.items():
        n = counted(() if said.verdict == NOT_RUN else rows)
        reason = _reason(said.reason, rows, part)
        lines.append(Line(figure, said.verdict, reason, n, f"{name}.png"))
    return lines


def _reason(reason: str, rows: Sequence[Row], part: Part) -> str:
    """The reason, and how many points lack results and what runs them."""
    counts = {s: sum(row.status == s for row in rows) for s in ("failed", "missing", "partial")}
    words = {"failed": "failed", "missing": "not run", "partial": "partly run"}
    lacking = ", ".join(f"{count} {words[s]}" for s, count in counts.items() if count)
    if not lacking:
        return reason
    said = "" if reason in (*counts, "no points") else f"{reason}; "
    how = f"; to go on: {part.command}" if part.command else ""
    return f"{said}of {len(rows)} points {lacking}{how}"
