"""A sweep that searches: finds the known curves, goes on where it was cut, says what it did."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
import tiny_sweep
from curve_unit import evaluated
from rich.console import Console

from quest_dist import compose, launch, lossless, table
from quest_dist.prepare import prepare

GRID = (
    "grid.method=[full,quest,tightbound,h2o]",
    "grid.budget=[64,128,256,512]",
    "task.passkey.samples=40",
    "search.delta=15",
    "search.first_samples=5",
)
ALL = 13 * 40


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CURVE_LOG", str(tmp_path / "log"))
    return tmp_path / "log"


def run(out: Path, *overrides: str) -> tuple[int, str]:
    text = io.StringIO()
    console = Console(file=text, width=140)
    config = tiny_sweep.config(out, [*GRID, *overrides])
    return launch.run(config, run_unit="curve_unit:run", out=console), text.getvalue()


def found(out: Path, name: str = "tiny") -> list[dict[str, str]]:
    with (out / name / "lossless.csv").open() as file:
        return list(csv.DictReader(file))


def evaluations(log: Path) -> int:
    return sum(points for _, _, points in evaluated(log))


def test_it_finds_what_is_there_and_says_what_it_saved(tmp_path: Path, log: Path) -> None:
    status, said = run(tmp_path / "out")
    assert status == launch.FINISHED
    brackets = {line["method"]: (line["budget"], line["lossy"]) for line in found(tmp_path / "out")}
    assert brackets == {"quest": ("256", "128"), "tightbound": ("128", "64"), "h2o": ("", "512")}
    done = evaluations(log)
    assert done < 0.8 * ALL
    assert f"evaluations: {done} of the grid's {ALL}, {ALL - done}" in said
    assert "delta 15 · confidence 0.95" in said
    assert "partial" not in said
    prefilled = [sample for _, sample, _ in evaluated(log)]
    assert len(prefilled) == len(set(prefilled))  # no sample twice


def test_rows_carry_what_was_found_through_their_csv(tmp_path: Path, log: Path) -> None:
    run(tmp_path / "out")
    rows = table.from_csv(tmp_path / "out" / "tiny" / "points.csv")
    assert (
        lossless.to_csv(lossless.found(rows))
        == (tmp_path / "out" / "tiny" / "lossless.csv").read_text()
    )
    assert lossless.evaluations(rows)[0] == evaluations(log)
    assert lossless.found([r for r in rows if r.method == "full"]) == []


def test_cut_anywhere_it_comes_to_the_same_end(
    tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "whole")
    once, whole = evaluated(log), found(tmp_path / "whole")
    log.unlink()
    for stop in range(3, len(once), 6):
        monkeypatch.setenv("CURVE_STOP", str(stop))
        assert run(tmp_path / "cut")[0] == launch.INCOMPLETE
    assert any(line["open"] == "True" for line in found(tmp_path / "cut"))
    monkeypatch.delenv("CURVE_STOP")
    assert run(tmp_path / "cut")[0] == launch.FINISHED
    assert found(tmp_path / "cut") == whole
    assert sorted(evaluated(log)) == sorted(once)
    log.unlink()
    assert run(tmp_path / "cut")[0] == launch.FINISHED
    assert evaluated(log) == []


def test_what_a_grid_has_evaluated_costs_nothing_and_decides_the_same(
    tmp_path: Path, log: Path
) -> None:
    run(tmp_path / "alone")
    alone = evaluations(log)
    log.unlink()
    run(tmp_path / "out", "search.delta=null", "limit=20")
    grid = evaluations(log)
    run(tmp_path / "out")
    assert found(tmp_path / "out") == found(tmp_path / "alone")
    assert 0 < evaluations(log) - grid < alone / 2


def test_failed_samples_are_left_out_then_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINY_ERROR_AT", "2")
    text = io.StringIO()
    config = tiny_sweep.config(tmp_path / "out", [*GRID, "task.passkey.samples=12"])
    broken = launch.run(config, run_unit="tiny_unit:run", out=Console(file=text, width=140))
    assert broken == launch.INCOMPLETE
    assert {line["open"] for line in found(tmp_path / "out")} == {"False"}
    monkeypatch.delenv("TINY_ERROR_AT")
    assert launch.run(config, run_unit="tiny_unit:run", out=Console(file=text)) == launch.FINISHED


def test_a_plan_says_best_and_worst_and_what_cannot_be_claimed(tmp_path: Path) -> None:
    _, said = run(tmp_path / "out", "plan=true", "task.passkey.samples=20")
    assert "at most 260 records" in said
    assert f"{13 * 5} evaluations if the next rung decides all, {13 * 20} (the grid)" in said
    assert "with 20 samples nothing can be called lossless: it takes 27 pairs at least" in said
    assert "the next rung alone: about" in said
    assert not (tmp_path / "out").exists()


def test_beside_a_grid_in_one_launch_it_finds_what_it_finds_alone(
    tmp_path: Path, log: Path
) -> None:
    out = tmp_path / "out"
    whole = tiny_sweep.config(out, ["name=both", "grid.model=[]"])
    grid = tiny_sweep.config(out, [*GRID, "name=grid", "search.delta=null", "limit=3"])
    search = tiny_sweep.config(out, [*GRID, "name=searched"])
    text = io.StringIO()
    console = Console(file=text, width=140)
    status = launch.run(whole, run_unit="curve_unit:run", out=console, parts=[grid, search])
    assert status == launch.FINISHED
    said = text.getvalue()
    assert f"of the grid's {ALL}, " in said[said.index("searched: ") :]
    together = found(out, "both")
    log.unlink()
    run(tmp_path / "alone")
    assert together == found(tmp_path / "alone")
    assert evaluations(log) <= 0.8 * ALL


def test_without_a_search_nothing_is_said_of_one(tmp_path: Path) -> None:
    _, said = run(tmp_path / "out", "search.delta=null", "limit=5")
    assert "lossless budget" not in said
    assert not (tmp_path / "out" / "tiny" / "lossless.csv").exists()
    assert "search" not in tiny_sweep.table(tmp_path / "out")


@pytest.mark.slow
def test_on_ray_it_finds_the_same(tmp_path: Path, log: Path) -> None:
    run(tmp_path / "inline")
    once = sorted(evaluated(log))
    log.unlink()
    status, _ = run(tmp_path / "ray", "cluster=local", "cluster.workers=2")
    assert status == launch.FINISHED
    assert found(tmp_path / "ray") == found(tmp_path / "inline")
    assert sorted(evaluated(log)) == once


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["search.delta=-2"], r"search.delta=-2: .* must be above 0"),
        (["grid.budget=[64]"], r"quest on passkey has one budget, 64; grid.budget needs at least"),
        (["grid.method=[full]"], r"search: no method with a budget in grid.method=\[full\]"),
        (["grid.method=[quest]"], r"nothing to compare quest on passkey with; grid.method needs"),
        (["grid.task=[pg19]"], r"task pg19 is scored in perplexity; a search needs scores of 0 to"),
        (["search.detla=2"], r"no 'detla' in search; did you mean 'delta'"),
        (["search.delta=abc"], r"search.delta=abc: "),
    ],
)
def test_a_search_that_cannot_be_is_refused(
    overrides: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(tiny_sweep.config(tmp_path / "out", [*GRID, *overrides]))


def test_the_sweep_asks_for_enough_samples_to_claim_something() -> None:
    config = compose.composed(["+sweep=matched"])
    sweep = prepare(config)
    (part,) = sweep.parts
    assert part.search.delta is not None
    searched = [part.counts[p.key] for p in part.points if p.key not in sweep.exclusive]
    assert min(searched) >= part.search.equal_pairs
