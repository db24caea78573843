"""What a search found: for each curve the smallest lossless budget, or between which it lies.

Invariants: a pure function of table rows, which carry in their details what was decided of each
budget, with delta and confidence; so a table read back from its CSV says the same. An evaluation is
a point on a sample; the grid is what would have been evaluated without a search.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from quest_dist import details
from quest_dist.search import LOSSY, OPEN, Search, smallest
from quest_dist.table import Row


@dataclass(frozen=True)
class Lossless:
    """The finding on one curve. `difference` with its interval is score minus full's at `at`."""

    model: str
    task: str
    method: str
    label: str
    page_size: int
    dense_layers: int
    budget: int | None  # lossless from here on; None: not even the largest surely is
    lossy: int | None  # the largest budget that surely loses delta or more; None: none does
    undecided: str  # budgets between the two, largest of all where budget is None
    at: int
    difference: float
    low: float
    high: float
    pairs: int
    delta: float
    confidence: float
    evaluations: int  # of the budgets of this curve; full's are shared by the curves of a task
    grid: int
    open: bool  # the search was cut short

    def said(self) -> str:
        """One line."""
        name = f"{self.task}: {self.label}"
        interval = f"{self.difference:+.1f} [{self.low:+.1f}, {self.high:+.1f}] at {self.at}"
        terms = f"delta {self.delta:g}, confidence {self.confidence:g}, n={self.pairs}"
        if self.open:
            return f"{name} is not searched to the end"
        lossy = f"lossy at {self.lossy}" if self.lossy else "no budget is surely lossy"
        unsure = f", {self.undecided} unresolved" if self.undecided else ""
        if self.budget is not None:
            return f"{name} lossless from {self.budget} ({lossy}{unsure}; {interval}; {terms})"
        return f"{name} nowhere surely lossless ({lossy}{unsure}; {interval}; {terms})"


def part(row: Row) -> dict[str, Any]:
    """What a search decided of a row; empty where none did."""
    return dict(details.read(row.details).get("search", {}))


def found(rows: Iterable[Row]) -> list[Lossless]:
    """The findings on all curves that were searched, in the order of the rows."""
    curves: dict[tuple[object, ...], dict[int, Row]] = {}
    for row in rows:
        if row.budget is not None and part(row):
            curves.setdefault(row.curve, {})[row.budget] = row
    return [_finding(curve) for curve in curves.values()]


def evaluations(rows: Iterable[Row]) -> tuple[int, int, int, int]:
    """(evaluations asked for, of the grid, prefills of samples, of the grid), full's included."""
    parts = [(row, part(row)) for row in rows]
    known = [(row, p) for row, p in parts if p]
    done, grid = sum(p["asked"] for _, p in known), sum(p["samples"] for _, p in known)
    full = [p for row, p in known if row.budget is None]
    return done, grid, sum(p["asked"] for p in full), sum(p["samples"] for p in full)


def lines(rows: Sequence[Row]) -> list[str]:
    """One line a curve, and the totals; none where nothing was searched."""
    return [*(finding.said() for finding in found(rows)), *totals(rows)]


def totals(rows: Sequence[Row]) -> list[str]:
    """What the search of the rows saved, and what a claim takes."""
    findings = found(rows)
    if not findings:
        return []
    done, grid, prefills, all_prefills = evaluations(rows)
    first = findings[0]
    pairs = Search(first.delta, first.confidence).equal_pairs
    return [
        f"evaluations: {done} of the grid's {grid}, {grid - done} ({1 - done / grid:.0%}) saved;"
        f" samples prefilled: {prefills} of {all_prefills}",
        f"lossless within {first.delta:g} takes {pairs} pairs at least, all equal, at confidence"
        f" {first.confidence:g}",
    ]


def to_csv(findings: Iterable[Lossless]) -> str:
    """The findings as CSV text, one header line; None is an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in fields(Lossless)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(finding) for finding in findings)
    return text.getvalue()


def _finding(curve: dict[int, Row]) -> Lossless:
    parts = {budget: part(row) for budget, row in sorted(curve.items())}
    verdicts = {budget: str(p["verdict"]) for budget, p in parts.items()}
    budget = smallest(verdicts)
    lossy = max((b for b, verdict in verdicts.items() if verdict == LOSSY), default=None)
    between = [b for b in parts if (lossy is None or b > lossy) and (budget is None or b < budget)]
    at = budget if budget is not None else max(parts)
    first, shown = curve[at], parts[at]
    return Lossless(
        model=first.model,
        task=first.task,
        method=first.method,
        label=first.label,
        page_size=first.page_size,
        dense_layers=first.dense_layers,
        budget=budget,
        lossy=lossy,
        undecided=" ".join(map(str, between)),
        at=at,
        difference=float(shown["value"]),
        low=float(shown["low"]),
        high=float(shown["high"]),
        pairs=int(shown["pairs"]),
        delta=float(shown["delta"]),
        confidence=float(shown["confidence"]),
        evaluations=sum(int(p["asked"]) for p in parts.values()),
        grid=sum(int(p["samples"]) for p in parts.values()),
        open=OPEN in verdicts.values(),
    )
