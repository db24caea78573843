"""Every figure draws from any table, says what it lacks, and its CSV is what was plotted."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path

import pytest
import synthetic_sweep as synthetic

from quest_dist import figures
from quest_dist.figures import grid, panels, paper, style
from quest_dist.figures.caption import Caption, lacking, samples, small_print
from quest_dist.table import Row

CAPTION = Caption(hardware="2 CPU cores", commit="1a2b3c4", date="2026-11-21")
FEW = {"methods": ("full", "quest", "h2o"), "budgets": (256, 512)}
TASK_OF = {
    "fig02": "attention_map",
    "fig04": "recall",
    "fig03": "sparsity",
    "fig06": "pg19",
    "fig07": "qasper",
    "table1": "passkey",
    "curves": "qasper",
}


def read(path: Path) -> list[dict[str, str]]:
    """Lines of a CSV."""
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", [name for name in TASK_OF if name != "fig03"])
def test_every_figure_is_three_files_and_the_csv_holds_every_dot(name: str, tmp_path: Path) -> None:
    rows = synthetic.sweep(tmp_path, synthetic.points([TASK_OF[name]], **FEW), 3)
    png, pdf, data = figures.draw(name, rows, tmp_path / "out", CAPTION)
    assert (png.suffix, pdf.suffix, data.suffix) == (".png", ".pdf", ".csv")
    assert png.read_bytes()[:4] == b"\x89PNG"
    assert b"/FontFile2" in pdf.read_bytes()
    plotted = {line["point"]: float(line["score"]) for line in read(data)}
    assert plotted == {row.point: pytest.approx(row.score) for row in rows}


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    rows = synthetic.sweep(tmp_path, synthetic.points(["qasper"], **FEW), 2)
    once, again = [figures.draw("curves", rows, tmp_path / part, CAPTION) for part in "ab"]
    assert [p.read_bytes() for p in once] == [p.read_bytes() for p in again]


@pytest.mark.parametrize("name", [name for name in TASK_OF if name != "fig03"])
@pytest.mark.parametrize("n", [0, 1])
def test_partial_tables_draw_what_exists(name: str, n: int, tmp_path: Path) -> None:
    points = synthetic.points([TASK_OF[name]], **FEW)
    rows = synthetic.sweep(tmp_path, points, n, expected=10)
    broken = replace(rows[1], status="failed", error="no such page", n=0, score=math.nan)
    rows = [replace(row, metric="perplexity") for row in (rows[0], broken, *rows[2:])]
    if name == "table1":
        rows = [replace(row, metric="accuracy") for row in rows]
    *_, data = figures.draw(name, rows, tmp_path, CAPTION)
    assert len(read(data)) == (len(rows) - 1) * n * (3 if name == "fig06" else 1)
    assert "1 of 5 points failed (Quest 256" in lacking(rows)


def test_a_figure_without_rows_of_its_own_is_not_drawn(tmp_path: Path) -> None:
    rows = synthetic.sweep(tmp_path, synthetic.points(["passkey"], **FEW), 1)
    assert figures.draw("fig07", rows, tmp_path / "out") == []
    assert not (tmp_path / "out").exists()


def test_an_unknown_figure_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no figure 'fig7'.*fig07"):
        figures.check(["fig7"])


@pytest.mark.parametrize(("tasks", "panels"), [(1, 1), (2, 2), (4, 4), (8, 8)])
def test_a_page_has_a_panel_for_each_task(tasks: int, panels: int, tmp_path: Path) -> None:
    points = synthetic.points(list(synthetic.TASKS)[:tasks], **FEW)
    rows = synthetic.sweep(tmp_path, points, 1)
    figure, _ = grid.page("curves", "Everything", rows, CAPTION)
    assert len(figure.axes) == panels
    words = " ".join(text.get_text() for text in figure.texts)
    for said in ("generated data", "SmolLM2-135M", "1a2b3c4", "2026-11-21", "2 CPU cores", "n = 1"):
        assert said in words


def test_methods_look_different_and_ours_stand_out() -> None:
    looks = list(style.LOOKS.values())
    assert len({look.color for look in looks}) == len(looks)
    assert {name for name, look in style.LOOKS.items() if look.strong} == {"quest", "tightbound"}
    assert style.look("never_heard_of") == style.look("never_heard_of")


def test_methods_without_a_budget_are_levels_in_their_own_colour(tmp_path: Path) -> None:
    points = synthetic.points(["qasper"], **FEW)
    rows = synthetic.sweep(tmp_path, points, 3)
    flat = next(row for row in rows if row.budget is None)
    rows.append(replace(flat, method="kivi2", label="KIVI-2", point="0" * 16, score=17.0))
    figure, _ = grid.page("curves", "Everything", rows, CAPTION)
    [axes], [legend] = figure.axes, figure.legends
    levels = {line.get_ydata()[0]: line.get_color() for line in axes.lines if line.is_dashed()}
    assert levels[17.0] == style.look("kivi2").color
    assert levels[flat.score] == style.look("full").color
    named = [text.get_text() for text in legend.texts]
    handle = legend.legend_handles[named.index("KIVI-2")]
    assert handle.get_color() == style.look("kivi2").color


def test_a_perplexity_far_beyond_the_best_does_not_flatten_the_others(tmp_path: Path) -> None:
    points = synthetic.points(["pg19"], methods=("full", "quest"), budgets=(256, 512, 1024))
    scores = [10.0, 5000.0, 5000.0, 12.0]
    rows = [
        replace(row, score=score, low=score, high=score, delta=math.nan)
        for row, score in zip(synthetic.sweep(tmp_path, points, 3), scores, strict=True)
    ]
    figure, plotted = grid.page("curves", "", rows, CAPTION)
    [axes] = figure.axes
    assert axes.get_yscale() == "log"
    assert axes.get_ylim()[1] < 50
    assert sorted(entry["score"] for entry in plotted) == sorted(scores)
    rings = [line for line in axes.lines if line.get_markerfacecolor() == "white"]
    assert [len(line.get_xdata()) for line in rings] == [2]
    assert any("hollow" in text.get_text() for text in figure.texts)


def test_the_caption_counts_what_it_shows(tmp_path: Path) -> None:
    rows = synthetic.sweep(tmp_path, synthetic.points(["qasper"], **FEW), 4)
    assert samples(rows) == "n = 4 samples a point"
    uneven = [replace(rows[0], n=2), *rows[1:]]
    assert samples([replace(r, n_expected=9) for r in uneven]) == "n = 2 to 4 of 9 samples a point"
    assert samples([replace(r, n=0) for r in rows]) == "no samples yet"
    assert all(len(line) <= 168 for line in small_print(rows * 9, CAPTION, ["", "word " * 90]))


def test_a_perplexity_shows_how_far_it_is_from_full_on_the_same_texts() -> None:
    row = dot(metric="perplexity", score=12.0, low=4.0, high=40.0, delta=2.0)
    row = replace(row, delta_low=1.5, delta_high=3.0)
    assert panels.interval(row) == (11.5, 13.0)
    assert panels.interval(replace(row, delta=math.nan)) == (4.0, 40.0)
    assert panels.interval(replace(row, metric="f1")) == (4.0, 40.0)
    assert panels.entry("fig06", row, "Quest")["interval"] == "difference from full"


def dot(**changes: object) -> Row:
    """The paper's Qasper dot of Quest at 512, as if we had measured it."""
    row = Row(
        point="0123456789abcdef",
        model="longchat_7b",
        task="qasper",
        method="quest",
        data="hub",
        label="Quest",
        budget=512,
        page_size=16,
        dense_layers=2,
        protocol="quest_paper",
        seed=42,
        metric="f1",
        n=200,
        n_expected=200,
        score=30.0,
        low=26.0,
        high=34.0,
        pairs=0,
        delta=math.nan,
        delta_low=math.nan,
        delta_high=math.nan,
        attended=512.0,
        planned=512.0,
        read=512.0,
        context_tokens=5800.0,
        new_tokens=20.0,
        seconds=1.0,
        truncated=0,
        finished_at=0.0,
        status="finished",
        error="",
        model_label="LongChat-7B-v1.5-32K",
        task_label="Qasper",
    )
    return replace(row, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "verdict", "reason"),
    [
        ({}, "reproduced", "ours 30.00 [26.00, 34.00], the paper 30.71"),
        ({"score": 27.0}, "within interval", "the paper 30.71"),
        ({"high": 30.5}, "differs", "the paper 30.71"),
        ({"method": "full", "budget": None, "score": 29.0}, "reproduced", "the paper 29.15"),
        ({"model_label": "SmolLM2-135M"}, "not comparable", "other model (SmolLM2-135M"),
        ({"data": "generated"}, "not comparable", "generated data"),
        ({"protocol": "longbench_official"}, "not comparable", "other protocol"),
        ({"page_size": 8}, "not comparable", "page size 8"),
        ({"dense_layers": 0}, "not comparable", "0 dense layers"),
        ({"method": "tightbound", "label": "TightBound"}, "not comparable", "the paper has no"),
        ({"budget": 128}, "not comparable", "the paper has no qasper for Quest at 128"),
        ({"low": math.nan, "n": 1}, "not comparable", "one sample"),
        ({"n": 0, "status": "missing"}, "not run", "missing"),
    ],
)
def test_a_verdict_never_rounds_in_our_favour(
    changes: dict[str, object], verdict: str, reason: str
) -> None:
    got = paper.judge("fig07", dot(**changes))
    assert got.verdict == verdict
    assert reason in got.reason


def test_passkey_is_compared_at_the_papers_context_length_only() -> None:
    row = dot(
        task="passkey", metric="accuracy", data="generated", score=100.0, low=96.0, high=100.0
    )
    assert paper.judge("table1", replace(row, context_tokens=9900.0)).verdict == "reproduced"
    assert paper.judge("table1", replace(row, context_tokens=4096.0)).verdict == "not comparable"


def test_a_figures_verdict_is_its_worst() -> None:
    rows = [dot(), dot(score=27.0), dot(high=30.5), dot(n=0)]
    got = paper.overall("fig07", rows)
    assert (got.verdict, got.reason) == (
        "differs",
        "of 3 values 1 differ, 1 within interval, 1 reproduced",
    )
    assert figures.verdicts("fig07", rows[:2])["fig07"].verdict == "within interval"
    assert figures.verdicts("fig06", rows)["fig06"].verdict == "not run"


def test_the_papers_marks_are_drawn_only_beside_comparable_points(tmp_path: Path) -> None:
    *_, ours = figures.draw("fig07", [dot()], tmp_path / "a", CAPTION)
    assert [line["series"] for line in read(ours)] == ["measured", "paper"]
    assert float(read(ours)[1]["score"]) == 30.71
    *_, other = figures.draw("fig07", [dot(model_label="other")], tmp_path / "b", CAPTION)
    assert [line["series"] for line in read(other)] == ["measured"]


def test_the_papers_numbers_are_whole() -> None:
    (longbench,) = paper.reference()["fig07"]
    assert set(longbench["values"]) == set(synthetic.LONGBENCH)
    for methods in longbench["values"].values():
        assert set(methods) == {"full", "streaming", "h2o", "tova", "quest"}
        assert all(len(v) == 5 for k, v in methods.items() if k != "full")
    short, long = (table["values"] for table in paper.reference()["table1"])
    assert len(short["passkey"]) == len(long["passkey_long"]) == 4
