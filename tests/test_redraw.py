"""Figures, verdicts and the report are drawn again from the tracking store, byte by byte."""

from __future__ import annotations

import io
import shutil
from dataclasses import replace
from pathlib import Path

import launches
import pytest
import synthetic_sweep as synthetic
import tiny_sweep
from rich.console import Console

from quest_dist import launch, mlflow_read, table
from quest_dist.figures.__main__ import main
from quest_dist.ledger import Ledger
from quest_dist.provenance import Provenance
from quest_dist.report import files
from quest_dist.report.launched import texts
from quest_dist.tracker import Sweep, Tracker

LAUNCHED = Provenance(
    "python -m quest_dist.sweep +sweep=tiny", "name: tiny\n", (), {"commit": "abcdef"}, "a CPU"
)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No store but the test's own."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a tiny sweep whose ledger is gone."""
    out = tmp_path_factory.mktemp("ran") / "outputs"
    with pytest.MonkeyPatch.context() as patched:
        patched.delenv("MLFLOW_TRACKING_URI", raising=False)
        patched.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
        config = tiny_sweep.config(out, ["tracking=mlflow", "figures=[table1,curves]"])
        console = Console(file=io.StringIO(), width=120)
        assert launch.run(config, LAUNCHED, "tiny_unit:run", console) == launch.FINISHED
        said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "not comparable" in said
    assert "report.html" in said
    (out / "ledger.db").unlink()
    return out


def contents(folder: Path) -> dict[str, bytes]:
    kept = [p for p in folder.iterdir() if p.is_file()]
    return {path.name: path.read_bytes() for path in kept}


def test_the_store_alone_gives_the_same_bytes(ran: Path, tmp_path: Path) -> None:
    before = contents(ran / "tiny")
    shutil.copytree(ran / "tiny", tmp_path / "kept")
    shutil.rmtree(ran / "tiny")
    store = f"sqlite:///{ran}/mlflow.db"
    assert main(["--tracking", store, "--sweep", "tiny", "--out", str(tmp_path / "again")]) == 0
    shutil.copytree(tmp_path / "kept", ran / "tiny")
    assert set(before) == {
        *("points.csv", "launch.json", "verdicts.csv", "report.html"),
        *(f"{figure}.{kind}" for figure in ("table1", "curves") for kind in ("png", "pdf", "csv")),
    }
    assert contents(tmp_path / "again") == before


def test_the_store_holds_the_report_and_the_figures(ran: Path) -> None:
    found = mlflow_read.newest(str(ran / "mlflow.db"), None)
    assert (found.name, found.status) == ("tiny", "FINISHED")
    for path in ("report.html", "verdicts.csv", "launch.json", "points.csv", "config.yaml"):
        assert found.text(path)
    assert found.text("report.html") == (ran / "tiny" / "report.html").read_text(encoding="utf-8")


def test_one_figure_is_drawn_and_a_missing_one_says_what_runs_it(
    ran: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "some"
    names = ["--figures", "table1", "fig07"]
    assert main(["--tracking", str(ran / "mlflow.db"), "--out", str(out), *names]) == 1
    assert (out / "table1.png").read_bytes() == (ran / "tiny" / "table1.png").read_bytes()
    assert not (out / "fig07.png").exists()
    assert not (out / "curves.png").exists()
    said = capsys.readouterr().out
    assert "fig07: not run: tiny has no point of it" in said
    assert "python -m quest_dist.sweep +sweep=longbench_budgets" in said


def test_a_table_of_points_is_enough(ran: Path, tmp_path: Path) -> None:
    beside = tmp_path / "beside"
    assert main(["--points", str(ran / "tiny" / "points.csv"), "--out", str(beside)]) == 0
    assert contents(beside) == contents(ran / "tiny")
    alone = tmp_path / "alone.csv"
    shutil.copy(ran / "tiny" / "points.csv", alone)
    assert main(["--points", str(alone), "--out", str(tmp_path / "bare")]) == 0
    assert {"table1.png", "report.html"} <= set(contents(tmp_path / "bare"))
    assert not (tmp_path / "bare" / "curves.png").exists()


def test_a_killed_sweep_is_drawn_as_far_as_it_went(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    points = synthetic.points(["qasper"], ("full", "quest"), (256, 512))
    with Ledger(tmp_path / "ledger.db") as ledger:
        synthetic.fill(ledger, points[:2], range(3))
        rows = table.rows(points, ledger, dict.fromkeys(synthetic.keys(points), 3))
        part = replace(launches.longbench(tmp_path), rows=tuple(rows))
        tracker = Tracker(
            {}, tmp_path, Sweep("long"), ledger, lambda rows: texts(launches.launch(part))
        )
        assert tracker.sync(rows)  # and nothing after it: the sweep never closes
    store = str(tmp_path / "mlflow.db")
    assert main(["--tracking", store, "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().out
    assert "still running, or was killed" in said
    assert f"of 3 points 1 not run; to go on: {launches.COMMAND}" in said
    assert ">incomplete<" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert (tmp_path / "out" / "fig07.png").is_file()


def test_the_newest_sweep_is_drawn_unless_one_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    points = synthetic.points(["qasper"], ("full",), (256,))
    with Ledger(tmp_path / "ledger.db") as ledger:
        synthetic.fill(ledger, points, range(3))
        rows = table.rows(points, ledger, dict.fromkeys(synthetic.keys(points), 3))
        for name, later in (("late", 9.0), ("early", 0.0)):
            moved = [replace(row, finished_at=row.finished_at + later) for row in rows]
            part = replace(launches.longbench(tmp_path), rows=tuple(moved))
            made = texts(launches.launch(part, name=name))
            assert Tracker({}, tmp_path, Sweep(name), ledger, lambda rows, made=made: made).finish(
                moved
            )
    store = ["--tracking", str(tmp_path / "mlflow.db")]
    assert main(store) == 0
    assert (tmp_path / "redrawn" / "late" / "fig07.png").is_file()
    assert main([*store, "--sweep", "early"]) == 0
    assert (tmp_path / "redrawn" / "early" / "fig07.png").is_file()
    assert main([*store, "--sweep", "eraly"]) == 2
    assert "no sweep 'eraly'" in capsys.readouterr().err


def test_mistakes_are_one_line(
    ran: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = ["--tracking", str(ran / "mlflow.db")]
    (tmp_path / "wrong.csv").write_text("point,model\n")
    for arguments, said in (
        ([], "no tracking store at"),
        ([*store, "--sweep", "tny"], "did you mean 'tiny'?"),
        ([*store, "--figures", "fig7"], "no figure 'fig7'; did you mean 'fig07'?"),
        (["--points", "nowhere.csv"], "nowhere.csv"),
        (["--points", "wrong.csv"], "table: no column 'attended'"),
    ):
        assert main(arguments) == 2
        err = capsys.readouterr().err
        assert said in err
        assert err.startswith("error: ")
        assert err.count("\n") == 1
    assert not (tmp_path / "outputs").exists()


def test_a_sweep_without_its_texts_says_how_to_write_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    points = synthetic.points(["qasper"], ("full",), (256,))
    with Ledger(tmp_path / "ledger.db") as ledger:
        synthetic.fill(ledger, points, range(1))
        rows = table.rows(points, ledger, dict.fromkeys(synthetic.keys(points), 1))
        assert Tracker({}, tmp_path, Sweep("old", "the command"), ledger).finish(rows)
    assert main(["--tracking", str(tmp_path / "mlflow.db")]) == 2
    err = capsys.readouterr().err
    assert "has no launch.json" in err
    assert "computing nothing twice: the command" in err


def test_a_written_folder_names_every_part(tmp_path: Path) -> None:
    made = launches.launch(launches.longbench(tmp_path), launches.passkey(tmp_path))
    files.write(made, tmp_path / "first")
    listing = tmp_path / "first" / "points" / "passkey.csv"
    assert main(["--points", str(listing), "--out", str(tmp_path / "second")]) == 1
    assert (tmp_path / "second" / "table1.png").is_file()
