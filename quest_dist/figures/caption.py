"""What a figure says about itself: title, what kind of data, and the small print below it.

Invariants: model, data, samples a point, what intervals mean, hardware, commit and date are part of
the picture, so a figure pasted elsewhere still says what it shows; generated data and incomplete
sweeps are named at the top, not only in the small print.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from quest_dist import stats
from quest_dist.figures import BADGES, style
from quest_dist.table import Row

LINE = 0.155  # inches a line of small print takes
HEAD = 0.62  # inches for title and subtitle
# By these a figure's words are found again; no bitmap and no PDF shows them.
GIDS = TITLE, SMALL_PRINT = "title", "small print"
REPEATED = ("repeat", "repeats")  # what a sample of a time is called


@dataclass(frozen=True)
class Caption:
    """Facts that no table row carries, and a title where the figure's own should not be used."""

    hardware: str = ""
    commit: str = ""
    date: str = ""
    command: str = ""
    title: str = ""


def small_print(rows: Sequence[Row], caption: Caption, notes: Sequence[str]) -> list[str]:
    """The lines below a figure, wrapped to its width; the first note is how intervals are drawn."""
    models, protocols = _named(r.model_label for r in rows), _named(r.protocol for r in rows)
    data = _named(BADGES.get(r.data, r.data) for r in rows)
    page = _named(f"{r.page_size}" for r in rows if r.budget is not None)
    dense = _named(f"{r.dense_layers}" for r in rows if r.budget is not None)
    made = [models, data, *([] if _times(rows) else [f"protocol {protocols}"]), samples(rows)]
    facts = [", ".join(made)]
    if page:
        layers = "no layer dense" if dense == "0" else f"first {dense} layers dense"
        facts.append(f"Page size {page}, {layers}")
    facts += notes[:1]
    where = [caption.hardware, caption.commit and f"commit {caption.commit}", caption.date]
    text = [". ".join(facts) + ".", *notes[1:], ", ".join(fact for fact in where if fact)]
    return [line for part in text if part for line in textwrap.wrap(part, 168)]


def samples(rows: Sequence[Row]) -> str:
    """How many samples stand behind a point: 'n = 10 a point', 'n = 3 to 10 of 10 a point'."""
    counts = sorted({row.n for row in rows if row.n})
    wanted = max((row.n_expected for row in rows), default=0)
    one, many = REPEATED if _times(rows) else ("sample", "samples")
    if not counts:
        return f"no {many} yet"
    if counts == [wanted] or (len(counts) == 1 and wanted <= counts[0]):
        return f"n = {counts[0]} {one if counts[0] == 1 else many} a point"
    span = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"n = {span} of {wanted} {many} a point"


def _times(rows: Sequence[Row]) -> bool:
    return any(row.metric in stats.TIMES for row in rows)


def lacking(rows: Sequence[Row]) -> str:
    """What is not in the picture and why, or an empty string."""
    parts = []
    for status, word in (("failed", "failed"), ("missing", "not run yet"), ("partial", "partial")):
        found = [row for row in rows if row.status == status]
        if found:
            which = [f"{r.label} {r.budget or ''} {r.task_label}".replace("  ", " ") for r in found]
            shown = ", ".join(which[:4]) + (f" and {len(which) - 4} more" if which[4:] else "")
            parts.append(f"{len(found)} of {len(rows)} points {word} ({shown})")
    return ("Incomplete: " + "; ".join(parts) + ".") if parts else ""


def put(
    figure: Figure, title: str, rows: Sequence[Row], caption: Caption, notes: Sequence[str]
) -> tuple[float, float]:
    """Write head and small print; return the (bottom, top) left for panels, in figure fractions."""
    height = float(figure.get_figheight())
    incomplete = lacking(rows)
    lines = small_print(rows, caption, [*notes, incomplete] if incomplete else list(notes))
    head: dict[str, Any] = {"va": "top", "size": 13, "weight": "bold", "gid": TITLE}
    figure.text(0.012, 1 - 0.10 / height, caption.title or title, **head)
    subtitle = f"{_named(row.model_label for row in rows)} · {samples(rows)}"
    figure.text(0.012, 1 - 0.36 / height, subtitle, va="top", size=9, color=style.FAINT)
    badge = _named(BADGES.get(row.data, row.data) for row in rows)
    badge += " · incomplete" if incomplete else ""
    alarming = incomplete or any(row.data == "generated" for row in rows)
    color = style.WARN if alarming else style.FAINT
    box = {"boxstyle": "round,pad=0.35", "facecolor": "white", "edgecolor": color, "lw": 0.9}
    figure.text(
        0.986, 1 - 0.13 / height, badge, va="top", ha="right", size=8.5, color=color, bbox=box
    )
    for i, line in enumerate(reversed(lines)):
        color = style.WARN if line.startswith("Incomplete") else style.FAINT
        small: dict[str, Any] = {"va": "bottom", "size": 7.2, "color": color, "gid": SMALL_PRINT}
        figure.text(0.012, (0.08 + i * LINE) / height, line, **small)
    return (0.16 + len(lines) * LINE) / height, 1 - HEAD / height


def words(figure: Figure) -> tuple[str, str]:
    """What `put` wrote on a figure: its title and its small print, as running text."""
    title, lines = ([t.get_text() for t in figure.texts if t.get_gid() == gid] for gid in GIDS)
    return " ".join(title), " ".join(reversed(lines))


def _named(values: object) -> str:
    return ", ".join(dict.fromkeys(str(v) for v in values))  # type: ignore[attr-defined]
