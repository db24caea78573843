"""The mean over tasks, and what a terminal shows of a recommendation."""

from __future__ import annotations

from pathlib import Path

import pytest
import synthetic_sweep as synthetic

from quest_dist import overview, stats, table

TASKS = ["qasper", "hotpotqa", "gov_report"]
METHODS = ["full", "quest", "streaming"]


def test_mean_over_tasks_counts_tasks_alike_and_narrows_the_interval(tmp_path: Path) -> None:
    rows = synthetic.sweep(tmp_path, synthetic.points(TASKS, METHODS, [128, 512]), 10)
    means = overview.average(rows)
    assert len(means) == 5
    for mean in means:
        parts = [r for r in rows if (r.method, r.budget) == (mean.method, mean.budget)]
        assert mean.task == "mean of 3 tasks"
        assert mean.n == 30
        assert mean.score == pytest.approx(sum(r.score for r in parts) / 3)
        assert mean.delta == pytest.approx(sum(r.delta for r in parts) / 3)
        assert mean.high - mean.low < max(r.high - r.low for r in parts)
        assert mean.low <= mean.score <= mean.high
    assert len(table.pivot([*rows, *means])) == 4


def test_points_that_a_task_lacks_have_no_mean(tmp_path: Path) -> None:
    points = synthetic.points(TASKS, METHODS, [128, 512])
    kept = [p for p in points if (p.task.name, p.budget) != ("hotpotqa", 512)]
    means = overview.average(synthetic.sweep(tmp_path, kept, 4))
    assert {row.budget for row in means} == {None, 128}


def test_one_task_or_perplexity_has_no_mean(tmp_path: Path) -> None:
    points = synthetic.points(["qasper", "pg19"], METHODS, [128])
    assert overview.average(synthetic.sweep(tmp_path, points, 4)) == []


def test_unresolved_comparisons_are_counted_not_listed() -> None:
    lines = [
        "qasper: Quest lossless from 512 (delta 2, n=200)",
        "qasper: H2O not resolved with n=10 (delta 2; nearest to full: +0.5 [-9.0, +9.0] at 512)",
        "qasper: TOVA not resolved with n=10",
    ]
    shown = overview.resolved(lines)
    assert shown[0] == lines[0]
    assert shown[1].startswith("2 of 3 comparisons with full are not resolved")
    assert overview.resolved(lines[:1]) == lines[:1]


def test_mean_rows_can_be_recommended_from(tmp_path: Path) -> None:
    rows = synthetic.sweep(tmp_path, synthetic.points(TASKS, METHODS, [128, 2048]), 40)
    lines = stats.recommendation(overview.average(rows))
    assert [line.split(":")[0] for line in lines] == ["mean of 3 tasks"] * 2
