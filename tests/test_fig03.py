"""Figure 3: the smallest budget of each layer that keeps the bound, and how it is judged."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path

import pytest
import synthetic_sweep as synthetic

from quest_dist import figures, table
from quest_dist.figures import fig03, paper
from quest_dist.figures.caption import Caption
from quest_dist.spec import canonical
from quest_dist.table import Row, pivot

FULL = 5.0
CONTEXT = 1000.0
PLAIN = synthetic.point("sparsity", "quest", 64)


def row(budget: int, *rises: tuple[float, float], **changes: object) -> Row:
    """A point of Quest whose layers 0, 1, ... raise perplexity by (value, half of interval)."""

    def nll(rise: float) -> float:
        return math.log1p(rise / FULL)

    curve = [
        [layer, nll(value), nll(value - half), nll(value + half), 4]
        for layer, (value, half) in enumerate(rises)
    ]
    details = {"curve": curve, "facts": {"dense_nll": math.log(FULL)}}
    facts: dict[str, object] = {
        "budget": budget,
        "point": f"point of {budget}",
        "context_tokens": CONTEXT,
        "metric": "nll_increase",
        "dense_layers": 0,
        "n": 4,
        "n_expected": 4,
        "score": 0.0,
        "low": 0.0,
        "high": 0.0,
        "status": "finished",
        "details": canonical(details),
    }
    return replace(blank(), **{**facts, **changes})  # type: ignore[arg-type]


def blank() -> Row:
    """The row of a point without records."""

    class Nothing:
        def records(self, point: str) -> list[table.Record]:
            return []

    (found,) = table.rows([PLAIN], Nothing(), {PLAIN.key: 4})
    return found


SURE, NEAR, OVER = (0.001, 0.001), (0.008, 0.004), (0.05, 0.01)
LINE = [
    row(50, OVER, NEAR, SURE, SURE),
    row(100, OVER, SURE, OVER, SURE),
    row(500, OVER, SURE, SURE, SURE),
]


def by_budget(rows: list[Row]) -> dict[int, Row]:
    return {row.budget or 0: row for row in rows}


def test_a_layer_takes_the_smallest_budget_that_it_and_all_larger_ones_allow() -> None:
    found = fig03.layers_of(by_budget(LINE))
    assert [layer.budget for layer in found] == [None, 50, 500, 50]
    assert [layer.sparsity for layer in found] == pytest.approx([0.0, 0.95, 0.5, 0.95])
    assert [(layer.low, layer.high) for layer in found] == [
        (0.0, 0.0),
        (pytest.approx(0.9), pytest.approx(0.95)),
        (pytest.approx(0.5), pytest.approx(0.5)),
        (pytest.approx(0.95), pytest.approx(0.95)),
    ]


def test_layers_that_the_samples_do_not_resolve_are_counted() -> None:
    (several,), (one,) = pivot(LINE), pivot([row(50, SURE)])
    assert fig03.resolved(several, fig03.BOUND) == "1 of 4 not resolved"
    assert fig03.resolved(several, fig03.WIDER) == ""
    assert fig03.resolved(one, fig03.BOUND) == ""


def test_the_bound_is_on_perplexity_not_on_nats() -> None:
    value, low, high = fig03.rise(row(50, (0.009, 0.002)), 0)
    assert (value, low, high) == pytest.approx((0.009, 0.007, 0.011))
    assert fig03.layers_of({50: row(50, (0.0099, 0.0))})[0].budget == 50
    assert fig03.layers_of({50: row(50, (0.0101, 0.0))})[0].budget is None


def test_a_layer_that_was_not_measured_at_a_budget_keeps_no_bound_there() -> None:
    rows = by_budget([row(50, SURE, SURE), row(100, SURE)])
    assert [layer.budget for layer in fig03.layers_of(rows)] == [50, None]


def test_the_csv_holds_every_layer_with_its_rise(tmp_path: Path) -> None:
    *_, data = figures.draw("fig03", table.from_csv(table.to_csv(LINE)), tmp_path, Caption())
    with data.open(encoding="utf-8") as file:
        both = list(csv.DictReader(file))
    lines, wider = both[:4], both[4:]
    assert {line["bound"] for line in lines} == {"0.01"}
    assert {line["bound"] for line in wider} == {"0.1"}
    assert [line["budget"] for line in wider] == ["50"] * 4
    assert [line["layer"] for line in lines] == ["0", "1", "2", "3"]
    assert [line["budget"] for line in lines] == ["", "50", "500", "50"]
    assert [line["point"] for line in lines][1] == "point of 50"
    assert float(lines[1]["rise"]) == pytest.approx(0.008)
    assert float(lines[0]["rise"]) == pytest.approx(0.05)
    assert {line["verdict"] for line in lines} == {"not comparable"}


def test_partial_tables_draw_what_they_have(tmp_path: Path) -> None:
    made = synthetic.points(["sparsity"], ("quest", "h2o"), (256, 512))
    for n in (0, 1, 3):
        rows = synthetic.sweep(tmp_path / str(n), made, n, expected=3)
        *_, data = figures.draw("fig03", rows, tmp_path / str(n), Caption())
        lines = list(csv.DictReader(data.read_text().splitlines()))
        assert len(lines) == (12 if n else 0)
    assert figures.verdicts("fig03", [])["fig03"].verdict == "not run"


def test_the_papers_layers_are_compared_only_for_its_model_and_data(tmp_path: Path) -> None:
    same = {"model_label": "LongChat-7B-v1.5-32K", "data": "hub", "context_tokens": 32000.0}
    ours = [replace(each, **same) for each in LINE]
    found = fig03.layers_of(by_budget(ours))
    judged = [fig03.judge(layer, "quest").verdict for layer in found]
    # The paper's line: 0.03, 0.02, 0.99, 0.61; ours 0, 0.998, 0.984, 0.998.
    assert judged == ["reproduced", "differs", "reproduced", "differs"]
    verdict = figures.verdicts("fig03", ours)["fig03"]
    assert (verdict.verdict, verdict.reason) == (
        "differs",
        "of 4 layers 2 differs, 0 within interval, 2 reproduced",
    )
    *_, data = figures.draw("fig03", ours, tmp_path, Caption())
    lines = list(csv.DictReader(data.read_text().splitlines()))
    hollow = [float(line["sparsity"]) for line in lines if line["series"] == "paper"]
    assert hollow == [0.03, 0.02, 0.99, 0.61]
    assert "other model" in fig03.judge(fig03.layers_of(by_budget(LINE))[0], "quest").reason


def test_the_papers_numbers_are_whole() -> None:
    (setting,) = paper.reference()["fig03"]
    lines = setting["values"]["sparsity"]
    assert {name: len(line) for name, line in lines.items()} == {"oracle_token": 29, "quest": 31}
