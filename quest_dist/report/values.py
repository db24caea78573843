"""Values: table rows as the words and numbers that a page shows."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from markupsafe import Markup, escape

from quest_dist import details, stats
from quest_dist.figures import BADGES
from quest_dist.report import rerun
from quest_dist.report.launched import Part
from quest_dist.table import Panel, Row

MOST_FACTS = 6  # beside a score; more would hide it, and all are in points.csv


def listed(names: Iterable[str]) -> str:
    """Distinct names, in their order."""
    return ", ".join(dict.fromkeys(names))


def badges(rows: Sequence[Row]) -> list[tuple[str, bool]]:
    """What must be seen first: the kind of data, what is unfinished; whether to be alarmed."""
    kinds = dict.fromkeys(row.data for row in rows)
    found = [(BADGES.get(kind, kind), kind == "generated") for kind in kinds]
    statuses = {row.status for row in rows}
    if statuses & {"missing", "partial"} or not rows:
        found.append(("incomplete", True))
    if "failed" in statuses:
        found.append(("failures", True))
    return found


def named(row: Row) -> str:
    """A row as a person names it."""
    budget = "" if row.budget is None else f" at {row.budget}"
    return f"{row.label}{budget} on {row.task_label} ({row.n} of {row.n_expected} samples)"


def number(value: float, metric: str) -> str:
    """A score: one digit after the point where it is of 0..100, else three digits that count."""
    if math.isnan(value):
        return ""
    return f"{value:.1f}" if metric in stats.POINTS else f"{value:.4g}"


def lossless(found: stats.Advice | None) -> tuple[str, str]:
    """What a cell of the table of budgets says, and its class."""
    if found is None:
        return "", ""
    if found.budget is not None:
        return str(found.budget), "lossless"
    return ("loses", "loses") if found.known else ("not resolved", "open")


def table(panel: Panel, part: Part) -> dict[str, Any]:
    """One task's points, a line each."""
    rows = [(line.label, row) for line in panel.lines for row in line.rows()]
    return {
        "title": f"{panel.title} · {panel.model_label}",
        "metric": panel.metric or "no result yet",
        "lines": [_line(label, row, part) for label, row in rows],
        "facts": any(_facts(row) for _, row in rows),
        "count": len(rows),
    }


def code(text: str) -> Markup:
    """Running text, escaped, with what stands between backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _line(label: str, row: Row, part: Part) -> dict[str, str]:
    metric = row.metric
    return {
        "label": label,
        "budget": "" if row.budget is None else str(row.budget),
        "score": number(row.score, metric),
        "interval": _span(row.low, row.high, metric),
        "delta": "" if row.method == "full" else _signed(row.delta, metric),
        "delta_interval": (
            "" if row.method == "full" else _span(row.delta_low, row.delta_high, metric)
        ),
        "n": str(row.n) if row.n == row.n_expected else f"{row.n} of {row.n_expected}",
        "attended": "" if math.isnan(row.attended) else f"{row.attended:.0f}",
        "planned": "" if math.isnan(row.planned) else f"{row.planned:.0f}",
        "facts": _facts(row),
        "status": row.status,
        "point": row.point,
        "command": rerun.command(row, part),
    }


def _signed(value: float, metric: str) -> str:
    if math.isnan(value):
        return ""
    return ("\u2212" if value < 0 else "+") + number(abs(value), metric)


def _span(low: float, high: float, metric: str) -> str:
    if math.isnan(low) or math.isnan(high):
        return ""
    return f"{number(low, metric)} to {number(high, metric)}".replace("-", "\u2212")


def _facts(row: Row) -> str:
    found = details.read(row.details).get("facts", {})
    shown = [f"{name} {value:.4g}" for name, value in found.items()]
    more = len(shown) - MOST_FACTS
    return ", ".join(shown[:MOST_FACTS]) + (f" and {more} more" if more > 0 else "")
