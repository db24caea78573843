"""Report: everything that a launch found, on one page that opens anywhere.

`page` is a pure function of the launch, its verdicts and its drawn figures: the same rows give the
same bytes. The page is one file without scripts, and its content policy forbids every request:
pictures are inside it. page.html is the template; whatever comes from outside is escaped.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from quest_dist import lossless, overview, stats
from quest_dist.figures import Drawn
from quest_dist.lossless import Lossless
from quest_dist.report import definitions, rerun, values
from quest_dist.report.launched import Launched, Part, date
from quest_dist.report.verdicts import Line
from quest_dist.table import Row, pivot

if TYPE_CHECKING:
    from jinja2 import Template

FILE = "report.html"


def page(launched: Launched, lines: Sequence[Line], drawn: Sequence[Drawn]) -> str:
    """The page as HTML text."""
    rows = launched.rows
    return _template().render(
        launched=launched,
        date=date(rows),
        models=values.listed(row.model_label for row in rows),
        data=values.listed(row.data for row in rows),
        badges=values.badges(rows),
        advice=[_advice(part) for part in launched.parts],
        delta=f"{stats.DELTA:g}",
        lines=lines,
        figures=[_figure(launched, lines, found) for found in drawn],
        parts=[_points(part) for part in launched.parts],
        methods=[
            {**said, "blocks": definitions.blocks(said["text"])}
            for said in launched.methods.values()
        ],
        statistics=definitions.blocks(definitions.docstring(definitions.STATISTICS)),
        verdicts=definitions.blocks(definitions.docstring(definitions.VERDICTS)),
        several=len(launched.parts) > 1,
    )


def _advice(part: Part) -> dict[str, Any]:
    """A table of tasks by methods, where each pair has one curve; and every line in words."""
    searched = lossless.found(part.rows)
    found = _searched(part, searched) or stats.advice([*part.rows, *overview.average(part.rows)])
    several = len({row.model for row in part.rows}) > 1
    cells: dict[str, dict[str, stats.Advice]] = {}
    for one in found:
        task = one.first.task_label + (f" · {one.first.model_label}" if several else "")
        cells.setdefault(task, {})[one.first.label] = one
    alone = sum(map(len, cells.values())) == len(found)
    methods = list(dict.fromkeys(one.first.label for one in found))
    table = {task: [values.lossless(by.get(m)) for m in methods] for task, by in cells.items()}
    return {
        "part": part,
        "methods": methods,
        "table": table if alone else {},
        "lines": [one.text for one in found] + lossless.totals(part.rows),
        "searched": searched[0] if searched else None,
    }


def _searched(part: Part, searched: Sequence[Lossless]) -> list[stats.Advice]:
    """What a search found, as advice: its own terms, which allow for samples that it stopped at."""
    largest: dict[tuple[object, ...], Row] = {}
    for row in part.rows:
        if row.budget is not None and lossless.part(row):
            other = largest.get(row.curve)
            if other is None or (other.budget or 0) < row.budget:
                largest[row.curve] = row
    return [
        stats.Advice(row, one.budget, one.budget is not None or one.lossy == row.budget, one.said())
        for row, one in zip(largest.values(), searched, strict=True)
    ]


def _figure(launched: Launched, lines: Sequence[Line], drawn: Drawn) -> dict[str, Any]:
    png = next(path for path in drawn.paths if path.suffix == ".png")
    own = [line for line in lines if line.file == png.name]
    part = next(part for part in launched.parts if drawn.name in part.figures)
    said = "; ".join(f"{line.figure} {line.verdict}" for line in own)
    return {
        "name": drawn.name,
        "title": drawn.title or drawn.name,
        "small_print": drawn.small_print,
        "alt": f"{drawn.title or drawn.name}. {said}. Its values are in {drawn.name}.csv.",
        "source": "data:image/png;base64," + base64.b64encode(png.read_bytes()).decode("ascii"),
        "width": int.from_bytes(png.read_bytes()[16:20], "big") // 2,
        "height": int.from_bytes(png.read_bytes()[20:24], "big") // 2,
        "files": [path.name for path in drawn.paths],
        "lines": own,
        "command": part.command,
    }


def _points(part: Part) -> dict[str, Any]:
    panels = pivot(part.rows)
    tables = [values.table(panel, part) for panel in panels]
    failed: dict[str, list[Row]] = {}
    for row in part.rows:
        if row.status == "failed":
            failed.setdefault(row.error, []).append(row)
    return {
        "part": part,
        "tables": tables,
        "failed": [
            (error, [values.named(row) for row in members]) for error, members in failed.items()
        ],
        "unrun": [values.named(row) for row in part.unfinished if row.status != "failed"],
        "example": rerun.example(part),
    }


@cache
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined

    made = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    text = resources.files("quest_dist.report").joinpath("page.html").read_text(encoding="utf-8")
    made.filters["code"] = values.code
    return made.from_string(text)
