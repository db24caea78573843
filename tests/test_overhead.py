"""The overhead benchmark: its launches, in miniature, and what they count."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_sweep

from quest_dist.bench import instant, one_launch, overhead
from quest_dist.bench.__main__ import main
from quest_dist.plan import Unit


def tiny(tmp_path: Path) -> overhead.Launches:
    """Launches of a model of a few bytes, in this process alone."""
    tiny_sweep.config(tmp_path / "made")  # the model
    model = f"+model.tiny={{source:local,path:{tmp_path / 'tiny_model'},label:Tiny}}"
    return overhead.Launches(tmp_path, [model, "grid.model=[tiny]", "cluster=inline"])


def test_an_instant_launch_finishes_its_points_and_is_measured(tmp_path: Path) -> None:
    launches = tiny(tmp_path)
    found = launches.instant(10, False, "cluster.samples_per_unit=4")
    assert found.status == 0
    assert found.busy > 0
    assert 0 < found.wall < found.whole
    assert 10 < found.rss <= found.peak
    again = launches.instant(10, False, "cluster.samples_per_unit=4", again=True)
    assert again.status == 0
    (first, second) = (dict(zip(overhead.COLUMNS, row, strict=True)) for row in launches.rows)
    assert (first["points"], first["units"], first["samples"]) == (10, 3, 10)
    assert first["driver ms/point"] == 1e3 * found.busy / 10
    assert 0 < first["p99 ms"] <= first["held up ms"] < 1e3 * found.wall
    assert (second["units"], second["held up ms"]) == (0, None)
    assert second["launch"].endswith(", again")


def test_a_report_says_how_long_the_one_before_it_was_held_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = tiny_sweep.points(tmp_path / "made")
    clock = iter([0.0, 7.0, 10.0, 12.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    instant._waited.clear()
    reports = list(instant.run(Unit(points, (0, 1)).to_dict(), {}))
    waits = [{record["metrics"]["waited"] for record in r["records"]} for r in reports]
    assert waits == [{0.0}, {7.0}]
    assert instant._waited == [2.0]


def test_a_launch_that_breaks_is_said_with_its_last_words(tmp_path: Path) -> None:
    config = tiny_sweep.config(tmp_path / "made", ["limit=0"])
    with pytest.raises(RuntimeError, match="tiny: the launch ended with 1: ValueError: limit=0"):
        one_launch.took(config, instant.RUN)


@pytest.mark.parametrize(
    ("points", "made"), [(10, (1, 1)), (70, (7, 1)), (100, (10, 1)), (1000, (10, 10))]
)
def test_sizes_are_made_of_tasks_and_seeds(points: int, made: tuple[int, int]) -> None:
    assert overhead.tasks_and_seeds(points) == made
    assert len(overhead.TASKS) == len(set(overhead.TASKS)) == 10


@pytest.mark.parametrize("points", ["5", "0", "110"])
def test_other_sizes_are_refused(points: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["overhead", "--points", points]) == 2
    assert f"--points={points}: 10 a task up to 100" in capsys.readouterr().err
