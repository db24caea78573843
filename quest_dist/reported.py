"""Reported: what a sweep has to show now: its rows, part by part, out of its ledger.

Invariant: a pure function of the sweep and the ledger, whenever it is asked.
"""

from __future__ import annotations

import shlex

from quest_dist import matched, table
from quest_dist.ledger import Ledger
from quest_dist.prepare import Sweep
from quest_dist.provenance import Provenance
from quest_dist.report import definitions
from quest_dist.report.launched import Launched, Part
from quest_dist.table import Made, Row
from quest_dist.work import EMPTY


def rows(sweep: Sweep, ledger: Ledger, made: Made | None = None) -> list[Row]:
    """The table of all points, with what searches found; `made` keeps rows for the next time."""
    found = table.rows(sweep.points, ledger, sweep.asking(ledger, EMPTY).counts, made)
    for part in sweep.parts:
        found = matched.told(part.search, part.points, part.counts, sweep.exclusive, ledger, found)
    return found


def by_part(sweep: Sweep, ledger: Ledger, made: Made | None = None) -> list[list[Row]]:
    """The table of each part's points, with what its own search found."""
    asking = sweep.asking(ledger, EMPTY).parts
    return [
        matched.told(
            part.search,
            part.points,
            part.counts,
            sweep.exclusive,
            ledger,
            table.rows(part.points, ledger, now.counts, made),
        )
        for part, now in zip(sweep.parts, asking, strict=True)
    ]


def launched(
    sweep: Sweep, ledger: Ledger, provenance: Provenance, made: Made | None = None
) -> Launched:
    """What is reported: each part with its figures and its own rows."""
    parts = tuple(
        Part(
            part.name,
            part.figures,
            tuple(own),
            provenance.command if len(sweep.parts) == 1 else _command(part.name, provenance),
            part.about,
        )
        for part, own in zip(sweep.parts, by_part(sweep, ledger, made), strict=True)
    )
    specs = {point.method.name: point.method for point in sweep.points}
    return Launched(
        name=sweep.name,
        parts=parts,
        about=sweep.about,
        command=provenance.command,
        hardware=provenance.hardware,
        source=provenance.source,
        environment=provenance.environment,
        methods=definitions.methods(specs.values()),
    )


def _command(part: str, provenance: Provenance) -> str:
    """The launch's command for one of its parts alone."""
    own = ("sweep=", "name=", "about=", "parts=")
    given = [a for a in provenance.overrides if not a.lstrip("+").startswith(own)]
    return shlex.join(["python", "-m", "quest_dist.sweep", f"+sweep={part}", *given])
