"""Score against bytes: the front is what no other beats, and both figures draw what was weighed."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import synthetic_sweep as synthetic

from quest_dist import figures
from quest_dist.figures import by_bytes
from quest_dist.figures.caption import Caption
from quest_dist.table import Row

DOTS = [(4.0, 50.0), (1.0, 10.0), (2.0, 30.0), (2.0, 40.0), (3.0, 40.0), (8.0, 49.0)]


def weighed(row: Row, moved: float, held: float) -> Row:
    facts = {"facts": {"bytes_moved": moved, "bytes_held": held}}
    return replace(row, details=json.dumps(facts))


def test_the_front_is_what_no_other_beats_in_both() -> None:
    assert by_bytes.front(DOTS, lower=False) == [(1.0, 10.0), (2.0, 40.0), (4.0, 50.0)]
    assert by_bytes.front(DOTS, lower=True) == [(1.0, 10.0)]
    assert by_bytes.front([(2.0, 5.0), (1.0, 7.0)], lower=True) == [(1.0, 7.0), (2.0, 5.0)]


@pytest.mark.parametrize("name", ["pareto_moved", "pareto_held"])
def test_every_weighed_point_is_drawn_at_its_bytes(name: str, tmp_path: Path) -> None:
    points = synthetic.points(["qasper", "pg19"], methods=("full", "quest"), budgets=(256, 512))
    rows = synthetic.sweep(tmp_path, points, 3)
    rows = [weighed(row, 2**20 * (n + 1), 2**21 * (n + 1)) for n, row in enumerate(rows)]
    _, _, data = figures.draw(name, rows, tmp_path / "out", Caption())
    with data.open(encoding="utf-8") as file:
        plotted = {line["point"]: line for line in csv.DictReader(file)}
    times = 1 if name == "pareto_moved" else 2
    assert set(plotted) == {row.point for row in rows}
    for number, row in enumerate(rows):
        assert float(plotted[row.point]["mib"]) == times * (number + 1)
        assert float(plotted[row.point]["score"]) == pytest.approx(row.score)
    for task in ("qasper", "pg19"):
        assert any(line["front"] == "True" for line in plotted.values() if line["task"] == task)


def test_a_time_and_what_was_not_weighed_do_not_belong(tmp_path: Path) -> None:
    points = synthetic.points(["qasper"], methods=("full", "quest"), budgets=(256,))
    rows = synthetic.sweep(tmp_path, points, 3)
    assert figures.belonging("pareto_moved", rows) == []
    timed = replace(weighed(rows[0], 1.0, 1.0), metric="step_ms")
    assert figures.belonging("pareto_moved", [timed]) == []


@pytest.mark.parametrize(("metric", "scale"), [("perplexity", "log"), ("nll_increase", "linear")])
def test_only_perplexity_is_logarithmic_and_cut(metric: str, scale: str, tmp_path: Path) -> None:
    points = synthetic.points(["pg19"], methods=("full", "quest"), budgets=(256, 512))
    scores = [10.0, 12.0, 5000.0] if metric == "perplexity" else [0.0, 0.2, 5000.0]
    rows = [
        replace(weighed(row, 2.0**20, 2.0**20), metric=metric, score=score, low=score, high=score)
        for row, score in zip(synthetic.sweep(tmp_path, points, 3), scores, strict=True)
    ]
    figure, plotted = by_bytes.page("pareto_moved", "", "", "bytes_moved", rows, Caption())
    [axes] = figure.axes
    assert axes.get_yscale() == scale
    assert sorted(float(entry["score"]) for entry in plotted) == scores
    said = [text.get_text() for text in (*figure.texts, *axes.texts)]
    cut = any("hollow" in text for text in said)
    assert cut == ("5,000" in said) == (metric == "perplexity")
    assert (axes.get_ylim()[1] < 50) == cut
