"""Figure 11 is a function of rows: brackets, latency at a budget, and the paper beside them."""

from __future__ import annotations

import csv
from dataclasses import replace
from html import escape
from pathlib import Path

import pytest
import synthetic_sweep as synthetic

from quest_dist import details, figures, lossless, matched, report, table
from quest_dist.figures import fig11, latency_at
from quest_dist.figures.caption import Caption
from quest_dist.ledger import Ledger
from quest_dist.report.launched import Launched, Part
from quest_dist.search import Search
from quest_dist.table import Row

BUDGETS = (128, 512, 2048)
SEARCH = Search(delta=10.0)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """Two tasks searched to the end over 120 samples, read back from CSV."""
    made = synthetic.points(["qasper", "triviaqa"], ("full", "tova", "quest"), BUDGETS)
    counts = dict.fromkeys(synthetic.keys(made), 120)
    with Ledger(tmp_path_factory.mktemp("ledger") / "ledger.db") as ledger:
        synthetic.fill(ledger, made, range(120))
        asked = matched.asked(SEARCH, made, counts, frozenset(), ledger, {})
        found = table.rows(made, ledger, asked)
        told = matched.told(SEARCH, made, counts, frozenset(), ledger, found)
    return table.from_csv(table.to_csv(told))


def decided(row: Row, **changes: object) -> Row:
    """A row of the paper's own model and data, with what a search decided of it."""
    part = {"delta": 2.0, "confidence": 0.95, "verdict": "unresolved", "asked": 200, "samples": 200}
    part |= {"pairs": 200, "value": -1.0, "low": -3.0, "high": 1.0} | changes
    text = details.joined("{}", "search", part)
    return replace(row, model_label="LongChat-7B-v1.5-32K", data="hub", details=text)


def time(row: Row, method: str, budget: int | None, value: float, context: float) -> Row:
    own = {
        "task": "kernels",
        "metric": "attention_us",
        "details": "{}",
        "point": f"{method}{budget}",
    }
    where = {"method": method, "budget": budget, "context_tokens": context}
    return replace(row, score=value, low=value - 1, high=value + 1, **own, **where)  # type: ignore[arg-type]


def read(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_csv_says_what_was_drawn_and_why_there_is_no_latency(
    rows: list[Row], tmp_path: Path
) -> None:
    png, pdf, data = figures.draw("fig11", rows, tmp_path, Caption(commit="1a2b3c4"))
    assert png.stat().st_size > 10_000
    assert pdf.exists()
    lines = read(data)
    assert [(line["task"], line["method"]) for line in lines] == [
        (task, method) for task in ("qasper", "triviaqa") for method in ("full", "tova", "quest")
    ]
    assert {line["delta"] for line in lines[1:3]} == {"10.0"}
    assert {line["verdict"] for line in lines if line["method"] != "full"} == {"not comparable"}
    figure, _ = fig11.draw(rows, Caption())
    words = " ".join(text.get_text() for text in figure.texts)
    assert "Latency: not measured in this sweep" in words
    assert "above -10 points" in words
    assert "The paper states no delta" in words


def test_latency_is_of_the_method_itself_between_timed_budgets_at_a_context_not_shorter(
    rows: list[Row],
) -> None:
    row = rows[0]
    times = [
        time(row, "quest", 512, 20.0, 8192),
        time(row, "quest", 1024, 40.0, 8192),
        time(row, "quest", 512, 5.0, 2048),
        time(row, "full", None, 160.0, 8192),
        time(row, "full", None, 300.0, 16384),
    ]
    at = latency_at.at(times, row, "quest", 768, 3600)
    assert at == latency_at.Latency(30.0, 29.0, 31.0, 8192)
    assert latency_at.at(times, row, "quest", 512, 3600) == latency_at.Latency(20, 19, 21, 8192)
    full = latency_at.at(times, row, "full", None, 3600)
    assert full is not None
    assert full.value == 160.0
    for method, budget, context in (("quest", 256, 3600), ("tova", 512, 3600), ("quest", 512, 9e4)):
        assert latency_at.at(times, row, method, budget, context) is None


def test_times_are_drawn_below_and_never_judged_against_other_hardware(
    rows: list[Row], tmp_path: Path
) -> None:
    times = [time(rows[0], "full", None, 160.0, 8192)]
    times += [time(rows[0], "quest", b, 10 + b / 50, 8192) for b in BUDGETS]
    *_, data = figures.draw("fig11", [*rows, *times], tmp_path)
    lines = [line for line in read(data) if line["part"] == "attention_us"]
    assert {line["method"] for line in lines if line["value"]} >= {"full", "quest"}
    assert all(not line["value"] for line in lines if line["method"] == "tova")
    assert fig11.verdicts([*rows, *times])["fig11b"].verdict == "not comparable"


@pytest.mark.parametrize(
    ("words", "verdict"),
    [
        (("lossy", "lossless", "lossless"), "reproduced"),  # the paper: 512
        (("unresolved", "unresolved", "lossless"), "within interval"),
        (("unresolved", "unresolved", "unresolved"), "within interval"),
        (("lossy", "lossy", "lossless"), "differs"),
        (("lossless", "lossless", "lossless"), "differs"),
    ],
)
def test_a_bracket_is_held_against_the_papers_budget(
    rows: list[Row], words: tuple[str, ...], verdict: str, tmp_path: Path
) -> None:
    quest = [r for r in rows if (r.task, r.method) == ("qasper", "quest")]
    full = next(r for r in rows if (r.task, r.budget) == ("qasper", None))
    own = [decided(r, verdict=word) for r, word in zip(quest, words, strict=True)]
    got = fig11.verdicts([decided(full), *own])
    assert got["fig11a"].verdict == verdict
    assert "without a delta" in got["fig11a"].reason or "of 1 values" in got["fig11a"].reason
    assert got["fig11b"].reason == "latency: not measured in this sweep"
    *_, data = figures.draw("fig11", [decided(full), *own], tmp_path)
    papers = [float(line["value"]) for line in read(data) if line["series"] == "paper"]
    assert papers == [5819, 512]


def test_a_table_without_a_search_has_no_figure_11(rows: list[Row], tmp_path: Path) -> None:
    assert figures.draw("fig11", [replace(r, details="{}") for r in rows], tmp_path) == []
    assert figures.verdicts("fig11", [])["fig11a"].verdict == "not run"


def test_the_report_tells_what_was_searched_in_its_own_terms(rows: list[Row]) -> None:
    page = report.page(Launched("matched", (Part("matched", (), tuple(rows), "run it"),)), [], [])
    assert "Searched, not swept: here within" in page
    for finding in lossless.found(rows):
        assert escape(finding.said()) in page
        if finding.budget is not None:
            assert f'<td class="n lossless">{finding.budget}</td>' in page
