"""MLflow shows the ledger: once, completely, after any crash, and never in the sweep's way."""

from __future__ import annotations

import base64
import itertools
import json
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import synthetic_sweep as synthetic
import tracking_server

from quest_dist import compose, mlflow_store, models, plan, prepare, projection, table
from quest_dist.ledger import Ledger
from quest_dist.plan import Point
from quest_dist.tracker import Sweep, Tracker

GRID: dict[str, Any] = {
    "tasks": ("qasper", "passkey"),
    "methods": ("full", "quest"),
    "budgets": (256, 512),
}
SWEEP = Sweep(
    "longbench", "python -m quest_dist.sweep +sweep=longbench", "name: longbench\n", device="cpu"
)


CURVE_AT_512 = ("Quest", "score/qasper", 512)


@pytest.fixture(scope="session")
def blank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated, empty MLflow database: made once, for it takes seconds."""
    folder = tmp_path_factory.mktemp("blank")
    with Ledger(folder / "ledger.db") as ledger:
        assert Tracker({}, folder, Sweep("unused"), ledger).sync([])
    return folder / "mlflow.db"


@pytest.fixture
def folder(tmp_path: Path, blank: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An output folder with a fresh store."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    shutil.copy(blank, tmp_path / "mlflow.db")
    return tmp_path


@pytest.fixture
def ledger(folder: Path) -> Iterator[Ledger]:
    """The ledger of that folder."""
    with Ledger(folder / "ledger.db") as opened:
        yield opened


def rows_of(ledger: Ledger, points: list[Point], expected: int) -> list[table.Row]:
    """Rows of the points, each asked for `expected` samples."""
    return table.rows(points, ledger, dict.fromkeys(synthetic.keys(points), expected))


def runs_of(tracker: Tracker) -> list[Any]:
    """All live runs of the tracker's experiment."""
    store = tracker._open()
    return list(store.client.search_runs([store.experiment_id]))


def values_of(tracker: Tracker) -> Counter[tuple[str, str, int, float]]:
    """How often each (run, metric, step, value) is in the store."""
    store = tracker._open()
    return Counter(
        (run.info.run_name, name, metric.step, metric.value)
        for run in runs_of(tracker)
        for name in run.data.metrics
        for metric in store.client.get_metric_history(run.info.run_id, name)
    )


def named(tracker: Tracker, name: str) -> Any:
    """The one live run of a name."""
    (run,) = [run for run in runs_of(tracker) if run.info.run_name == name]
    return run


def test_curves_at_the_top_points_below_and_one_sweep(folder: Path, ledger: Ledger) -> None:
    points = synthetic.points(**GRID)
    synthetic.fill(ledger, points, range(3))
    rows = rows_of(ledger, points, 3)
    tracker = Tracker({}, folder, SWEEP, ledger)
    assert tracker.sync(rows)
    runs = runs_of(tracker)
    assert Counter(run.data.tags["quest.kind"] for run in runs) == {
        "point": 6,
        "curve": 2,
        "sweep": 1,
    }
    top = {r.info.run_name for r in runs if "mlflow.parentRunId" not in r.data.tags}
    assert top == {"Full", "Quest", "sweep longbench"}
    curve, point = named(tracker, "Quest"), named(tracker, "Quest b256 · Qasper")
    assert point.data.tags["mlflow.parentRunId"] == curve.info.run_id
    row = next(r for r in rows if (r.task, r.budget) == ("qasper", 256))
    assert point.data.metrics["score"] == row.score
    assert point.data.metrics["budget"] == 256
    assert point.data.metrics["detail/entropy"] == 1.5
    assert point.data.params["method.radius_scale"] == "1"
    assert point.data.params["protocol.greedy"] == "True"
    assert point.data.tags["quest.point"] == row.point
    assert point.data.tags["quest.data"] == "generated"
    assert [run.data.tags.get("quest.device") for run in runs].count("cpu") == 1
    assert point.info.status == "FINISHED"
    assert point.info.end_time == round(row.finished_at * 1000)
    read = [each.dataset for each in curve.inputs.dataset_inputs]
    assert sorted(each.name for each in read) == ["passkey (generated)", "qasper (generated)"]
    assert all(len(each.digest) <= 36 for each in read)


def test_launches_with_other_settings_have_curves_of_their_own(
    folder: Path, ledger: Ledger
) -> None:
    """In one line, dots of both would look like one method; and the later would delete the rest."""
    first = synthetic.points(["qasper"], ["full", "quest"], [256])
    (at_512,) = synthetic.points(["qasper"], ["quest"], [512])
    settings = {**at_512.method.settings, "gqa": "max"}
    other = [replace(at_512, method=replace(at_512.method, settings=settings))]
    synthetic.fill(ledger, [*first, *other], range(2))
    for points in (first, [first[0], *other]):
        assert Tracker({}, folder, SWEEP, ledger).sync(rows_of(ledger, points, 2))
    tracker = Tracker({}, folder, SWEEP, ledger)
    runs = runs_of(tracker)
    curves = {r.info.run_id: r for r in runs if r.data.tags["quest.kind"] == "curve"}
    assert sorted(r.info.run_name for r in curves.values()) == ["Full", "Quest", "Quest"]
    steps = {
        (curve.data.params["method.gqa"], metric.step)
        for run_id, curve in curves.items()
        if curve.info.run_name == "Quest"
        for metric in tracker._open().client.get_metric_history(run_id, "score/qasper")
    }
    assert steps == {("per_query", 256), ("max", 512)}
    for run in runs:
        if run.data.tags["quest.kind"] == "point" and run.info.run_name.startswith("Quest"):
            parent = curves[run.data.tags["mlflow.parentRunId"]]
            assert parent.data.params["method.gqa"] == run.data.params["method.gqa"]


def test_params_say_how_prompts_are_made_and_answers_end(folder: Path, ledger: Ledger) -> None:
    config = compose.composed(["+sweep=smoke", "protocol=kvpress", "profile=paper"])
    chosen = prepare.specs_of(config["model"], "model")["llama31_8b"]
    made = replace(
        synthetic.point("qasper", "quest", 256),
        model=plan.with_content(chosen, models.identity(chosen.settings)),
        protocol=prepare.protocol_of(config["protocol"]),
        dense_layers=config["grid"]["dense_layers"][0],
    )
    synthetic.fill(ledger, [made], range(1))
    (row,) = rows_of(ledger, [made], 1)
    identity = ledger.identity(row.point) or {}
    params = projection.point_run(row, identity, ledger.records(row.point)).params
    assert {k: v for k, v in params.items() if "protocol" in k} == {
        "protocol": "kvpress",
        "protocol.tail": "input",
        "protocol.truncation": "head",
        "protocol.chat": "True",
        "protocol.extra_new_tokens": "20",
    }
    assert params["dense_layers"] == "0"
    assert params["model.bos"] == "True"
    assert params["model.eos"] == "[128001, 128008, 128009]"
    assert params["model.chat"] == "template"
    assert params["model.max_length"] == "131072"


def test_a_curve_is_score_against_budget_and_full_is_level(folder: Path, ledger: Ledger) -> None:
    points = synthetic.points(**GRID)
    synthetic.fill(ledger, points, range(3))
    rows = rows_of(ledger, points, 3)
    tracker = Tracker({}, folder, SWEEP, ledger)
    tracker.sync(rows)
    score = {(r.method, r.task, r.budget): r.score for r in rows}
    found = {
        (run, step): value
        for run, name, step, value in values_of(tracker)
        if name == "score/qasper"
    }
    assert found == {
        ("Quest", 256): score["quest", "qasper", 256],
        ("Quest", 512): score["quest", "qasper", 512],
        ("Full", 256): score["full", "qasper", None],
        ("Full", 512): score["full", "qasper", None],
    }


def test_the_first_curves_of_a_grid_are_the_newest_which_the_charts_show(
    folder: Path, ledger: Ledger
) -> None:
    methods = ("full", "quest", "h2o", "tova", "streaming")
    points = synthetic.points(["qasper"], methods=methods, budgets=(256,))
    synthetic.fill(ledger, points, range(2))
    rows = [replace(row, finished_at=1e9) for row in rows_of(ledger, points, 2)]
    runs = projection.curve_runs(rows, ledger.identity)
    newest = sorted(runs, key=lambda run: run.started, reverse=True)
    labels = list(dict.fromkeys(row.label for row in rows))
    assert [run.name for run in newest] == labels
    some = [replace(row, status="missing") if row.method == "quest" else row for row in rows]
    apart = {run.name: run.started for run in projection.curve_runs(some, ledger.identity)}
    assert apart.items() <= {run.name: run.started for run in runs}.items()


def test_a_second_sync_and_a_second_driver_write_nothing(folder: Path, ledger: Ledger) -> None:
    points = synthetic.points(**GRID)
    synthetic.fill(ledger, points, range(2))
    rows = rows_of(ledger, points, 2)
    first = Tracker({}, folder, SWEEP, ledger)
    first.finish(rows)
    before = values_of(first)
    assert max(before.values()) == 1
    again = Tracker({}, folder, SWEEP, ledger)
    assert again.sync(rows)
    assert again.finish(rows)
    assert values_of(again) == before
    assert len(runs_of(again)) == 9


class Killed(BaseException):
    """A crash that no `except Exception` holds up."""


CALLS = ("create_run", "log_inputs", "log_batch", "set_terminated", "set_tag")


@pytest.mark.parametrize("last", [1, 2, 3, 5, 7, 8, 9, 10, 14])
def test_a_crash_after_any_call_leaves_nothing_twice(
    folder: Path, ledger: Ledger, last: int
) -> None:
    points = synthetic.points(["qasper"], ("full", "quest"), (256,))
    synthetic.fill(ledger, points, range(2))
    rows = rows_of(ledger, points, 2)
    tracker = Tracker({}, folder, SWEEP, ledger)
    store: Any = tracker._open()
    count = itertools.count(1)

    def fatal(call: Any) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            done = call(*args, **kwargs)
            if next(count) == last:
                raise Killed
            return done

        return called

    for name in CALLS:
        setattr(store.client, name, fatal(getattr(store.client, name)))
    store.log_text = fatal(store.log_text)  # into the store's own folder
    with pytest.raises(Killed):
        tracker.sync(rows)
    whole = Tracker({}, folder, SWEEP, ledger)
    assert whole.sync(rows)
    assert max(values_of(whole).values()) == 1
    runs = runs_of(whole)
    names = Counter(run.info.run_name for run in runs)
    assert names == dict.fromkeys(
        ("sweep longbench", "Full", "Quest", "Full · Qasper", "Quest b256 · Qasper"), 1
    )
    assert {r.info.status for r in runs if r.data.tags["quest.kind"] != "sweep"} == {"FINISHED"}
    assert all("quest.digest" in run.data.tags for run in runs)
    curve = named(whole, "Quest").info.run_id
    assert named(whole, "Quest b256 · Qasper").data.tags["mlflow.parentRunId"] == curve


def test_a_wider_grid_lengthens_the_curves(folder: Path, ledger: Ledger) -> None:
    narrow = synthetic.points(["qasper"], ("full", "quest"), (256,))
    wide = synthetic.points(["qasper"], ("full", "quest"), (256, 512))
    tracker = Tracker({}, folder, SWEEP, ledger)
    synthetic.fill(ledger, narrow, range(2))
    tracker.sync(rows_of(ledger, narrow, 2))
    curve = named(tracker, "Quest").info.run_id
    synthetic.fill(ledger, wide, range(2))
    tracker.sync(rows_of(ledger, wide, 2))
    assert named(tracker, "Quest").info.run_id == curve
    assert max(values_of(tracker).values()) == 1
    steps = {(run, step) for run, name, step, _ in values_of(tracker) if name == "score/qasper"}
    assert steps == {("Quest", 256), ("Quest", 512), ("Full", 256), ("Full", 512)}


def test_a_curve_that_grows_is_neither_read_back_nor_sent_again(
    folder: Path, ledger: Ledger
) -> None:
    tracker = Tracker({}, folder, SWEEP, ledger)
    client: Any = tracker._open().client
    sent: list[tuple[str, int]] = []
    log_batch, read = client.log_batch, client.get_metric_history

    def counted(run_id: str, metrics: Any = (), *rest: Any) -> None:
        sent.extend((m.key, m.step) for m in metrics if m.key.startswith("score/"))
        log_batch(run_id, metrics, *rest)

    client.log_batch = counted
    client.get_metric_history = None  # calling it would be an error
    for budgets in ((256,), (256, 512), (256, 512, 1024)):
        points = synthetic.points(["qasper"], ("quest",), budgets)
        synthetic.fill(ledger, points, range(2))
        assert tracker.sync(rows_of(ledger, points, 2))
    assert sent == [("score/qasper", 256), ("score/qasper", 512), ("score/qasper", 1024)]
    client.get_metric_history = read
    assert max(values_of(tracker).values()) == 1


def test_more_samples_move_the_dots_and_keep_the_points_history(
    folder: Path, ledger: Ledger
) -> None:
    points = synthetic.points(["qasper"], ("full", "quest"), (256,))
    tracker = Tracker({}, folder, SWEEP, ledger)
    synthetic.fill(ledger, points, range(2))
    tracker.sync(rows_of(ledger, points, 2))
    point = named(tracker, "Quest b256 · Qasper").info.run_id
    synthetic.fill(ledger, points, range(5))
    rows = rows_of(ledger, points, 5)
    tracker.sync(rows)
    score = next(r.score for r in rows if r.method == "quest")
    grown = named(tracker, "Quest b256 · Qasper")
    assert grown.info.run_id == point
    assert grown.data.metrics["score"] == score
    assert grown.data.metrics["n"] == 5
    curve = named(tracker, "Quest")
    assert grown.data.tags["mlflow.parentRunId"] == curve.info.run_id
    history = [(n, s, v) for run, n, s, v in values_of(tracker) if run == "Quest"]
    assert [(s, v) for n, s, v in history if n == "score/qasper"] == [(256, score)]
    shown = tracker._open().client.download_artifacts(point, "samples.json", str(folder))
    assert len(json.loads(Path(shown).read_text())["data"]) == 5


def test_a_dot_that_fails_and_comes_back_is_not_there_twice(folder: Path, ledger: Ledger) -> None:
    points = synthetic.points(["qasper"], ("full", "quest"), (256, 512))
    tracker = Tracker({}, folder, SWEEP, ledger)
    synthetic.fill(ledger, points, range(2))
    tracker.sync(rows_of(ledger, points, 2))
    client: Any = tracker._open().client
    asked = client.get_metric_history
    client.get_metric_history = lambda *given: pytest.fail("it wrote all of it itself")
    (dot,) = [point for point in points if point.budget == 512]
    synthetic.fill(ledger, [dot], [2], error="ValueError: no such page")
    assert tracker.sync(rows_of(ledger, points, 2))
    synthetic.fill(ledger, [dot], [2, 3])
    assert tracker.sync(rows_of(ledger, points, 2))
    client.get_metric_history = asked
    (score,) = [row.score for row in rows_of(ledger, points, 2) if row.point == dot.key]
    history = [v for run, n, s, v in values_of(tracker) if (run, n, s) == CURVE_AT_512]
    assert history == [score]


def test_a_crash_while_a_curve_is_replaced_heals(folder: Path, ledger: Ledger) -> None:
    points = synthetic.points(["qasper"], ("full", "quest"), (256,))
    synthetic.fill(ledger, points, range(2))
    tracker = Tracker({}, folder, SWEEP, ledger)
    tracker.sync(rows_of(ledger, points, 2))
    client: Any = tracker._open().client
    delete = client.delete_run

    def fatal(run_id: str) -> None:
        delete(run_id)
        raise Killed

    client.delete_run = fatal
    synthetic.fill(ledger, points, range(4))
    rows = rows_of(ledger, points, 4)
    with pytest.raises(Killed):
        tracker.sync(rows)
    whole = Tracker({}, folder, SWEEP, ledger)
    assert whole.sync(rows)
    assert max(values_of(whole).values()) == 1
    for curve, point in (("Quest", "Quest b256 · Qasper"), ("Full", "Full · Qasper")):
        parent = named(whole, curve).info.run_id
        assert named(whole, point).data.tags["mlflow.parentRunId"] == parent


def test_a_failed_point_is_a_failed_run_with_its_error(folder: Path, ledger: Ledger) -> None:
    points = synthetic.points(["qasper"], ("full", "quest"), (256,))
    synthetic.fill(ledger, points[:1], range(2))
    synthetic.fill(ledger, points[1:], [0])
    synthetic.fill(ledger, points[1:], [1], error="Traceback\nValueError: no such page")
    tracker = Tracker({}, folder, SWEEP, ledger)
    tracker.finish(rows_of(ledger, points, 2))
    run = named(tracker, "Quest b256 · Qasper")
    assert run.info.status == "FAILED"
    assert run.data.tags["quest.error"] == "ValueError: no such page"
    assert run.data.tags["mlflow.parentRunId"] == named(tracker, "Quest").info.run_id
    assert named(tracker, "sweep longbench").info.status == "FAILED"
    synthetic.fill(ledger, points[1:], [1])
    tracker.finish(rows_of(ledger, points, 2))
    assert named(tracker, "Quest b256 · Qasper").info.status == "FINISHED"
    assert named(tracker, "sweep longbench").info.status == "FINISHED"


def test_partial_points_wait_for_the_end(folder: Path, ledger: Ledger) -> None:
    points = synthetic.points(["qasper"], ("full", "quest"), (256,))
    synthetic.fill(ledger, points, range(2))
    rows = rows_of(ledger, points, 4)
    tracker = Tracker({}, folder, SWEEP, ledger)
    tracker.sync(rows)
    assert not [run for run in runs_of(tracker) if run.data.tags["quest.kind"] == "point"]
    assert named(tracker, "sweep longbench").info.status == "RUNNING"
    assert named(tracker, "sweep longbench").data.metrics["progress"] == 50
    tracker.finish(rows)
    assert named(tracker, "Quest b256 · Qasper").info.status == "KILLED"
    assert named(tracker, "sweep longbench").info.status == "KILLED"


def test_the_sweeps_run_holds_figures_tables_and_what_follows(folder: Path, ledger: Ledger) -> None:
    points = synthetic.points(["qasper"], ("full", "quest"), (256,))
    synthetic.fill(ledger, points, range(2))
    picture = folder / "fig07.png"
    picture.write_bytes(b"not really")
    listing = folder / "points.csv"
    listing.write_text("as the sweep wrote it")
    tracker = Tracker({}, folder, SWEEP, ledger)
    rows = rows_of(ledger, points, 2)
    assert tracker.finish(rows, [picture, listing], "qasper: Quest lossless from 256")
    run = named(tracker, "sweep longbench")
    client = tracker._open().client
    held = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert held == {"figures", "points.csv", "config.yaml"}
    note = run.data.tags["mlflow.note.content"]
    for said in ("lossless from 256", "[fig07.png](#/experiments/", SWEEP.command):
        assert said in note
    assert run.info.artifact_uri.startswith((folder / "mlartifacts").as_uri())
    copy = Path(client.download_artifacts(run.info.run_id, "points.csv", str(folder)))
    assert [row.point for row in table.from_csv(copy)] == synthetic.keys(points)


def test_rebuilding_is_a_sync_into_an_empty_store(
    folder: Path, ledger: Ledger, blank: Path
) -> None:
    points = synthetic.points(**GRID)
    synthetic.fill(ledger, points, range(2))
    rows = rows_of(ledger, points, 2)
    first = Tracker({}, folder, SWEEP, ledger)
    first.finish(rows)
    before = values_of(first)
    shutil.copy(blank, folder / "other.db")
    rebuilt = Tracker({"uri": f"sqlite:///{folder}/other.db"}, folder, SWEEP, ledger)
    assert rebuilt.finish(rows)
    assert values_of(rebuilt) == before


def test_runs_of_another_sweep_are_left_alone(folder: Path, ledger: Ledger) -> None:
    points = synthetic.points(["qasper"], ("full", "quest"), (256,))
    synthetic.fill(ledger, points, range(2))
    rows = rows_of(ledger, points, 2)
    settings = {"experiment": "ours"}
    one = Tracker(settings, folder, SWEEP, ledger)
    two = Tracker(settings, folder, Sweep("smoke"), ledger)
    one.finish(rows)
    two.finish(rows)
    assert len(runs_of(one)) == 10
    assert one._open().experiment_id == two._open().experiment_id


def test_an_unreachable_server_is_a_warning_and_a_pause(
    folder: Path, ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    points = synthetic.points(["qasper"], ("full",), (256,))
    synthetic.fill(ledger, points, [0])
    tracker = Tracker({"uri": "http://127.0.0.1:9"}, folder, SWEEP, ledger)
    with caplog.at_level(logging.WARNING):
        assert not tracker.sync(rows_of(ledger, points, 1))
        assert not tracker.sync(rows_of(ledger, points, 1))
    assert [record.name for record in caplog.records if "9" in record.message].count(
        "quest_dist.tracker"
    ) == 1
    assert not tracker.finish(rows_of(ledger, points, 1))


@pytest.mark.parametrize("call", ["create_run", "log_batch", "log_text", "set_terminated"])
def test_what_fails_once_is_done_again_from_what_is_there(
    folder: Path, ledger: Ledger, call: str, caplog: pytest.LogCaptureFixture
) -> None:
    points = synthetic.points(["qasper"], ("full", "quest"), (256,))
    synthetic.fill(ledger, points, range(2))
    tracker = Tracker({}, folder, SWEEP, ledger)
    client: Any = tracker._open().client
    done = getattr(client, call)

    def answer_lost(*given: Any, **named: Any) -> None:
        done(*given, **named)
        raise OSError("connection reset")

    setattr(client, call, answer_lost)
    assert tracker.sync(rows_of(ledger, points, 2))
    assert not caplog.records
    assert len(runs_of(tracker)) == 5
    assert max(values_of(tracker).values()) == 1


def test_an_outage_is_one_warning_however_long(
    folder: Path, ledger: Ledger, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quest_dist.tracker.PAUSE", 0.0)
    away, there = "http://127.0.0.1:9", f"sqlite:///{folder}/mlflow.db"
    tracker = Tracker({"uri": away}, folder, SWEEP, ledger)
    for uri, written, warnings in (
        (away, False, 1),
        (away, False, 1),
        (there, True, 1),
        (away, False, 2),
    ):
        tracker.uri, tracker._store = uri, None
        assert tracker.sync([]) is written
        assert len(caplog.records) == warnings
    assert not tracker.finish([])
    assert len(caplog.records) == 2


def test_a_run_that_a_dying_server_made_twice_is_left_once(folder: Path, ledger: Ledger) -> None:
    points = synthetic.points(["qasper"], ("full", "quest"), (256,))
    synthetic.fill(ledger, points, range(2))
    rows = rows_of(ledger, points, 2)
    first = Tracker({}, folder, SWEEP, ledger)
    assert first.finish(rows)
    whole = {run.info.run_id for run in runs_of(first)}
    client = first._open().client
    for run in runs_of(first):
        tags = {k: v for k, v in run.data.tags.items() if k != "quest.digest"}
        client.create_run(run.info.experiment_id, run.info.start_time, tags)
    assert len(runs_of(first)) == 10
    assert Tracker({}, folder, SWEEP, ledger).finish(rows)
    assert {run.info.run_id for run in runs_of(first)} == whole


def test_two_launches_may_make_one_experiment(folder: Path, ledger: Ledger) -> None:
    one = Tracker({"experiment": "ours"}, folder, SWEEP, ledger)._open()
    client: Any = mlflow_store.connect(f"sqlite:///{folder}/mlflow.db")
    find, asked = client.get_experiment_by_name, itertools.count()
    client.get_experiment_by_name = lambda name: find(name) if next(asked) else None
    tags = {"quest.origin": "elsewhere", "quest.sweep": "other"}
    assert mlflow_store.Store(client, "ours", None, tags).experiment_id == one.experiment_id


def test_a_request_waits_briefly_and_is_not_repeated_unless_the_user_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in mlflow_store.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    mlflow_store.connect("http://127.0.0.1:9")
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT")
    with tracking_server.silent() as uri:
        monkeypatch.setitem(mlflow_store.ENVIRONMENT, "MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
        began = time.monotonic()
        with pytest.raises(Exception, match=r"timed? ?out|1 seconds"):
            mlflow_store.connect(uri).search_experiments()
        assert time.monotonic() - began < 5


def test_credentials_come_from_the_environment_and_go_nowhere_else(
    folder: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "open sesame")
    with tracking_server.refusing() as (uri, headers):
        assert not Tracker({"uri": uri}, folder, SWEEP, ledger).sync([])
    sent = {header["Authorization"] for header in headers}
    assert sent == {f"Basic {base64.b64encode(b'me:open sesame').decode()}"}
    assert len(caplog.records) == 1
    assert "sesame" not in caplog.text
    assert not any(b"sesame" in path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_the_environment_wins(
    folder: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Tracker({"uri": None, "experiment": None}, folder, SWEEP, ledger)
    assert own.uri == f"sqlite:///{folder}/mlflow.db"
    assert own.uri in own.command()
    assert own.experiment == "quest_dist/longbench"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "shared")
    other = Tracker({"uri": "http://elsewhere", "experiment": "mine"}, folder, SWEEP, ledger)
    assert (other.uri, other.experiment, other.command()) == ("http://tracking:5000", "shared", "")


def test_the_url_opens_the_curves_as_charts(folder: Path, ledger: Ledger) -> None:
    tracker = Tracker({}, folder, SWEEP, ledger)
    assert tracker.url() == ""
    tracker.sync([])
    assert "runs?compareRunsMode=CHART&searchFilter=tags.%60quest.kind%60" in tracker.url()


def test_a_description_is_a_pure_function_with_a_digest(tmp_path: Path) -> None:
    points = synthetic.points(["qasper"], ("full", "quest"), (256,))
    rows = synthetic.sweep(tmp_path, points, 2)
    once, again = [projection.curve_runs(rows, lambda point: None) for _ in range(2)]
    assert [run.digest for run in once] == [run.digest for run in again]
    assert once[0].digest != once[1].digest
