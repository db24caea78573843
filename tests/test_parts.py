"""Parts: several sweeps as one launch; what they share runs once."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_sweep
from rich.console import Console

from quest_dist import compose, launch, table
from quest_dist.ledger import Ledger
from quest_dist.parts import combined

TWO = ("grid.budget=[64]", "name=one", "figures=[curves]"), ("name=two", "figures=[table1]")


def launched(folder: Path, *parts: Sequence[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    whole = tiny_sweep.config(folder, ["name=both", "grid.model=[]"])
    return whole, [tiny_sweep.config(folder, overrides) for overrides in parts]


def run(folder: Path, *parts: Sequence[str]) -> tuple[int, str]:
    whole, each = launched(folder, *parts)
    out = Console(file=io.StringIO(), width=120)
    status = launch.run(whole, run_unit="tiny_unit:run", out=out, parts=each)
    return status, out.file.getvalue()  # type: ignore[attr-defined]


def test_shared_points_are_merged_and_parts_keep_theirs(tmp_path: Path) -> None:
    whole, each = launched(tmp_path / "out", *TWO)
    sweep = combined(whole, each)
    assert [part.name for part in sweep.parts] == ["one", "two"]
    assert [len(part.points) for part in sweep.parts] == [2, 3]
    assert len(sweep.points) == 3
    assert sweep.directory == tmp_path / "out" / "both"


def test_the_larger_number_of_samples_is_run_and_each_part_counts_its_own(tmp_path: Path) -> None:
    parts = ("name=few", "limit=2"), ("name=many", "grid.budget=[64]")
    sweep = combined(*launched(tmp_path / "out", *parts))
    few, many = sweep.parts
    shared = {p.key for p in few.points} & {p.key for p in many.points}
    assert len(shared) == 2
    assert {sweep.counts[key] for key in shared} == {6}
    assert {few.counts[key] for key in shared} == {2}


def test_one_launch_draws_the_figures_of_all_parts(tmp_path: Path) -> None:
    status, said = run(tmp_path / "out", *TWO)
    assert status == launch.FINISHED
    folder = tmp_path / "out" / "both"
    assert {p.name for p in folder.glob("*.png")} == {"curves.png", "table1.png"}
    assert len(table.from_csv(folder / "points.csv")) == 3
    assert said.index("one: ") < said.index("two: ")
    with Ledger(tmp_path / "out" / "ledger.db") as ledger:
        points = tiny_sweep.points(tmp_path / "out", "name=two")
        assert ledger.complete(points, {point.key: 6 for point in points})
    again, said = run(tmp_path / "out", *TWO)
    assert again == launch.FINISHED
    assert "nothing left to run" in said


def test_a_mistake_in_a_part_names_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^part two: grid\.method: unknown method 'qest'"):
        run(tmp_path / "out", TWO[0], ("name=two", "grid.method=[qest]"))


def test_parts_are_composed_from_the_same_overrides() -> None:
    whole = compose.composed(["+sweep=smoke", "limit=3", "name=mine", "parts=[passkey,smoke]"])
    parts = compose.parts(whole, ["+sweep=smoke", "limit=3", "name=mine", "parts=[passkey,smoke]"])
    assert [part["name"] for part in parts] == ["passkey", "smoke"]
    assert [part["limit"] for part in parts] == [3, 3]
    with pytest.raises(ValueError, match="parts: no sweep 'pasky'; did you mean 'passkey'"):
        compose.parts({"parts": ["pasky"]}, [])
