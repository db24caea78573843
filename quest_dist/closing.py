"""Closing: the tables and lines that a sweep ends with."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from quest_dist.lossless import Lossless
from quest_dist.report.verdicts import Line
from quest_dist.table import Panel, Row, pivot

#: Decimals of a score, where they are not one.
DIGITS = {"perplexity": 2, "nll_increase": 5, "tokens_per_pass": 2}


def console() -> Console:
    """Return a console on what is standard output now, whoever redirects it later.

    It is wide enough for a table where there is no terminal.
    """
    found = Console(file=sys.stdout, highlight=False, emoji=False)
    if not found.is_terminal:
        found = Console(file=sys.stdout, highlight=False, emoji=False, width=120)
    return found


def results(rows: Sequence[Row], out: Console) -> None:
    """Print one table a task: methods by budgets, scores with their 95 % intervals."""
    for panel in pivot(rows):
        out.print()
        out.print(_panel(panel))


def lossless(findings: Sequence[Lossless], totals: Sequence[str], out: Console) -> None:
    """Print what a search found, a line a curve, and what it took."""
    first = findings[0]
    title = f"smallest lossless budget · delta {first.delta:g} · confidence {first.confidence:g}"
    columns = ("task", "method", "lossless from", "lossy at", "unresolved")
    shown = Table(*columns, title=title, title_justify="left")
    for name in ("difference from full", "pairs", "evaluations"):
        shown.add_column(name, justify="right")
    several = len({finding.model for finding in findings}) > 1
    for finding in findings:
        shown.add_row(
            finding.task + (f" · {finding.model}" if several else ""),
            finding.label,
            "" if finding.budget is None else str(finding.budget),
            "" if finding.lossy is None else str(finding.lossy),
            "(cut short)" if finding.open else finding.undecided,
            _difference(finding),
            str(finding.pairs),
            f"{finding.evaluations}/{finding.grid}",
        )
    out.print()
    out.print(shown)
    out.print("\n".join(totals), markup=False, soft_wrap=True)


def heading(name: str, about: str, out: Console) -> None:
    """Print where one part of a launch begins."""
    out.print()
    out.rule(f"[bold]{escape(name)}[/]: {escape(about)}", align="left")


def _difference(finding: Lossless) -> str:
    if not finding.pairs:
        return ""
    interval = f"[dim]{finding.low:+.0f} to {finding.high:+.0f}[/dim]"
    return f"{finding.difference:+.1f} {interval} at {finding.at}"


def failures(rows: Iterable[Row], out: Console) -> None:
    """Print the points that failed with their errors, in one line; nothing when none did."""
    failed: dict[str, list[str]] = {}
    for row in rows:
        if row.status == "failed":
            budget = "" if row.budget is None else f" {row.budget}"
            failed.setdefault(row.error, []).append(
                f"{row.task} {row.method}{budget} [{row.point}]"
            )
    if failed:
        parts = (f"{', '.join(points)}: {error}" for error, points in failed.items())
        out.print(f"failed: {'; '.join(parts)}", style="red", markup=False, soft_wrap=True)


def verdicts(lines: Iterable[Line], out: Console) -> None:
    """Print how each figure stands to the paper."""
    listing = Table("figure", "verdict", "reason", "n", title="against the paper")
    listing.title_justify = "left"
    for line in lines:
        listing.add_row(*map(escape, (line.figure, line.verdict, line.reason, line.n)))
    out.print()
    out.print(listing)


def paths(files: Iterable[Path], look: Iterable[str], out: Console) -> None:
    """Print where the results are, and what to run or open (`look`) to see them in MLflow."""
    out.print()
    for line in [*map(_short, files), *(text for text in look if text)]:
        out.print(line, markup=False, soft_wrap=True)


def _panel(panel: Panel) -> Table:
    table = Table(title=f"{panel.task} · {panel.model} · {panel.metric}", title_justify="left")
    table.add_column("method", no_wrap=True)
    flat = any(line.flat is not None for line in panel.lines)
    if flat:
        table.add_column("no budget", justify="right")
    for budget in panel.budgets:
        table.add_column(str(budget), justify="right")
    for line in panel.lines:
        shown = [line.flat] if flat else []
        shown += [line.by_budget.get(budget) for budget in panel.budgets]
        cells = [_cell(row) for row in shown]
        table.add_row(line.label, *cells)
    table.caption = _caption([row for line in panel.lines for row in line.rows()])
    return table


def _caption(rows: Sequence[Row]) -> str:
    counted = sorted({row.n for row in rows if row.n})
    if not counted:
        return "no results"
    span = str(counted[0]) if len(counted) == 1 else f"{counted[0]} to {counted[-1]}"
    text = f"{span} sample{'' if counted == [1] else 's'}"
    if any(not math.isnan(row.low) for row in rows):
        text += "; beside each score its 95 % interval"
    cut = max(row.truncated for row in rows)
    if cut:
        text += f"; {cut} cut to fit the model"
    return text


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if row.n == 0:
        return escape(row.status)
    text = f"{row.score:.{DIGITS.get(row.metric, 1)}f}"
    if not math.isnan(row.low):
        text += f" [dim]{_bound(row, row.low)}\u2013{_bound(row, row.high)}[/dim]"
    return text if row.status == "finished" else f"{text} ({row.n}/{row.n_expected})"


def _bound(row: Row, value: float) -> str:
    # An interval of a perplexity from few samples can reach into the millions.
    return f"{value:.3g}" if row.metric in DIGITS else f"{value:.0f}"


def _short(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
