"""Files: a launch's results on disk: points, figures, verdicts and the report.

Invariants: a pure function of the launch, so a folder written from the tracking store equals the
one that the launch wrote, file by file.
"""

from __future__ import annotations

from pathlib import Path

from quest_dist import figures, report
from quest_dist.figures import Drawn
from quest_dist.report import launched as facts
from quest_dist.report import verdicts
from quest_dist.report.launched import Launched, Part


def write(launched: Launched, directory: Path) -> list[Path]:
    """Write everything into a folder; return the files, the report last.

    There is a report, and verdicts, where the launch has figures.
    """
    directory.mkdir(parents=True, exist_ok=True)
    paths = [_put(directory / path, text) for path, text in facts.texts(launched).items()]
    drawn = [
        found
        for part in launched.parts
        for name in part.figures
        if (found := _draw(name, launched, part, directory))
    ]
    paths += [path for figure in drawn for path in figure.paths]
    if launched.figures:
        lines = verdicts.lines(launched)
        paths.append(_put(directory / verdicts.FILE, verdicts.to_csv(lines)))
        paths.append(_put(directory / report.FILE, report.page(launched, lines, drawn)))
    return paths


def _draw(name: str, launched: Launched, part: Part, directory: Path) -> Drawn | None:
    from quest_dist.figures.caption import Caption

    caption = Caption(
        hardware=launched.hardware,
        commit=launched.commit,
        date=part.date,
        command=part.command,
    )
    return figures.drawn(name, part.rows, directory, caption)


def _put(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")
    return path
