"""The table is a pure function of points and records, and survives its CSV."""

from __future__ import annotations

import math
from dataclasses import astuple
from pathlib import Path

import pytest
import synthetic_sweep as synthetic

from quest_dist import table
from quest_dist.ledger import Ledger


def plain(row: table.Row) -> tuple[object, ...]:
    """A row with NaN comparable."""
    return tuple(None if isinstance(v, float) and math.isnan(v) else v for v in astuple(row))


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.db")


def test_every_point_has_a_row_and_a_status(ledger: Ledger) -> None:
    full, done, part, broken, never = [
        synthetic.point("qasper", method, budget)
        for method, budget in [
            ("full", 0),
            ("quest", 256),
            ("quest", 512),
            ("h2o", 256),
            ("tova", 9),
        ]
    ]
    synthetic.fill(ledger, [full, done], range(4))
    synthetic.fill(ledger, [part], range(2))
    synthetic.fill(ledger, [broken], range(3))
    synthetic.fill(ledger, [broken], [3], error="Traceback\n  ...\nValueError: no such page")
    points = [full, done, part, broken, never]
    rows = table.rows(points, ledger, dict.fromkeys(synthetic.keys(points), 4))
    assert [r.status for r in rows] == ["finished", "finished", "partial", "failed", "missing"]
    assert [r.n for r in rows] == [4, 4, 2, 3, 0]
    assert [r.pairs for r in rows] == [4, 4, 2, 3, 0]
    assert rows[3].error == "ValueError: no such page"
    assert rows[0].delta == 0
    assert math.isnan(rows[4].score)


def test_delta_is_paired_with_full_on_the_samples_both_have(ledger: Ledger) -> None:
    full, quest = synthetic.point("qasper", "full", 0), synthetic.point("qasper", "quest", 256)
    synthetic.fill(ledger, [full], range(5))
    synthetic.fill(ledger, [quest], range(3, 9))
    row = table.rows([quest, full], ledger, {})[0]
    scores = [
        [r["score"] for r in ledger.records(key) if r["sample"] in (3, 4)]
        for key in (quest.key, full.key)
    ]
    assert row.pairs == 2
    assert row.delta == pytest.approx(sum(scores[0]) / 2 - sum(scores[1]) / 2)


@pytest.mark.parametrize(
    ("changes", "pairs"), [({"page_size": 8}, 3), ({"seed": 1}, 0), ({"model": "other"}, 0)]
)
def test_full_of_another_page_size_will_do_but_not_of_another_seed_or_model(
    ledger: Ledger, changes: dict[str, object], pairs: int
) -> None:
    full = synthetic.point("qasper", "full", 0)
    if "model" in changes:
        quest = synthetic.point("qasper", "quest", 256, model="other")
    else:
        quest = synthetic.point("qasper", "quest", 256, **changes)
    synthetic.fill(ledger, [full, quest], range(3))
    assert table.rows([quest, full], ledger, {})[0].pairs == pairs


def test_rows_are_made_again_only_where_records_changed(ledger: Ledger) -> None:
    points = synthetic.points(["qasper"], ("full", "quest"), (256, 512))
    full, one, two = points
    synthetic.fill(ledger, [full, one], range(3))
    made, expected = table.Made(ledger.version), dict.fromkeys(synthetic.keys(points), 4)

    def again() -> list[table.Row]:
        rows = table.rows(points, ledger, expected, made)
        fresh = table.rows(points, ledger, expected)
        assert [plain(row) for row in rows] == [plain(row) for row in fresh]
        return rows

    before = again()
    assert all(a is b for a, b in zip(before, again(), strict=True))
    synthetic.fill(ledger, [one], [3])
    after = again()
    assert [a is b for a, b in zip(before, after, strict=True)] == [True, False, True]
    synthetic.fill(ledger, [full], [3], error="ValueError: broken")
    assert not any(a is b for a, b in zip(after[:2], again()[:2], strict=True))
    synthetic.fill(ledger, [full, two], [3])
    assert [row.pairs for row in again()] == [4, 4, 1]
    expected[full.key] = 5
    assert [row.status for row in again()] == ["partial", "finished", "partial"]


def test_csv_reads_back_to_equal_rows(tmp_path: Path, ledger: Ledger) -> None:
    points = synthetic.points(["qasper", "pg19", "passkey"])
    synthetic.fill(ledger, points[:9], range(3))
    synthetic.fill(ledger, points[9:10], [0], error='a "quoted", and\nbroken error')
    rows = table.rows(points, ledger, dict.fromkeys(synthetic.keys(points), 3))
    text = table.to_csv(rows)
    (tmp_path / "points.csv").write_text(text)
    assert [plain(r) for r in table.from_csv(text)] == [plain(r) for r in rows]
    assert [plain(r) for r in table.from_csv(tmp_path / "points.csv")] == [plain(r) for r in rows]
    assert "nan" not in text.lower()


def test_a_csv_without_a_column_names_it() -> None:
    with pytest.raises(ValueError, match="no column 'attended'"):
        table.from_csv("point,model\n")


def test_pivot_keeps_what_is_comparable_together(tmp_path: Path) -> None:
    tasks, methods, budgets = ["qasper", "passkey"], ["full", "quest", "h2o"], [256, 512]
    panels = table.pivot(synthetic.sweep(tmp_path, synthetic.points(tasks, methods, budgets), 2))
    assert [(p.task, p.metric, p.budgets) for p in panels] == [
        ("qasper", "f1", (256, 512)),
        ("passkey", "accuracy", (256, 512)),
    ]
    for panel in panels:
        assert [line.label for line in panel.lines] == ["Full", "Quest", "H2O"]
        assert panel.lines[0].flat is not None
        assert list(panel.lines[1].by_budget) == [256, 512]


def test_lines_are_named_by_what_tells_them_apart(tmp_path: Path) -> None:
    points = [
        synthetic.point("qasper", "quest", 256, page_size=size, dense_layers=dense)
        for size in (8, 16)
        for dense in (0, 2)
    ]
    (panel,) = table.pivot(synthetic.sweep(tmp_path, points, 1))
    assert [line.label for line in panel.lines] == [
        "Quest, page 8, 0 dense",
        "Quest, page 8, 2 dense",
        "Quest, page 16, 0 dense",
        "Quest, page 16, 2 dense",
    ]
