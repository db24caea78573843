"""Tracking: what MLflow takes a point, into its SQLite file and through a server.

Made-up points arrive in a ledger as a sweep's do, a family at a time, and are synced after each;
then everything again, which must write nothing: by the same driver, and by a new one, as the same
command run again makes it. No evaluation, no Ray; the thread that tracks is this one.

`rows ms` is what the driver computes to know what there is to write (the table of all points),
before MLflow comes in. A `request` is one of HTTP, artifacts' included.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quest_dist import machine_state, table
from quest_dist.bench.report import Report
from quest_dist.ledger import Ledger
from quest_dist.plan import Point, Spec
from quest_dist.projection import Sweep
from quest_dist.tracker import Tracker

TASKS, METHODS, BUDGETS = 10, 10, (128, 256, 512, 1024, 2048)
FAMILY = METHODS * len(BUDGETS)
STORES = ("sqlite", "server")
START_SECONDS = 120.0
SERVER_ENVIRONMENT = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # 13 processes that tracking has no use for
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
COLUMNS = (
    *("store", "points", "rows ms/point", "ms/point", "first 10 %", "last 10 %", "requests/point"),
    *("again s", "again requests", "new driver s", "new driver requests", "runs"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this benchmark."""
    parser.add_argument("--points", type=int, default=2000, help="how many (default: 2000)")
    parser.add_argument("--samples", type=int, default=10, help="of each point (default: 10)")
    parser.add_argument(
        "--stores", nargs="+", choices=STORES, default=list(STORES), help="default: both"
    )
    parser.add_argument(
        "--backend-store-uri",
        metavar="URI",
        help="the server's database, such as postgresql+psycopg2://... (default: SQLite)",
    )


def run(options: argparse.Namespace) -> Report:
    """Measure each store; ValueError for sizes that cannot be made."""
    if options.points < FAMILY or options.points % FAMILY:
        raise ValueError(f"--points={options.points}: a multiple of {FAMILY}")
    if options.samples < 1:
        raise ValueError(f"--samples={options.samples}: at least 1")
    points = made_up(options.points)
    before = machine_state.read()
    found: dict[str, Took] = {}
    for store in options.stores:
        with tempfile.TemporaryDirectory(prefix="quest-tracking-") as name:
            folder = Path(name)
            with _store(store, folder, options.backend_store_uri) as uri:
                found[store] = _took(uri, folder, points, options.samples)
    return _report(options, points, found, machine_state.stated(before, machine_state.read()))


@dataclass
class Took:
    """Seconds, and requests where there is a server, of all that is done with one store."""

    rows: float = 0.0
    syncs: list[float] = field(default_factory=list)
    requests: int = 0
    again: tuple[float, int] = (0.0, 0)
    anew: tuple[float, int] = (0.0, 0)
    runs: int = 0


def made_up(count: int) -> list[Point]:
    """So many points, family by family: methods and budgets of one task of one model."""
    families = [divmod(number, TASKS) for number in range(count // FAMILY)]
    return [
        Point(
            model=Spec(f"model{model}", {"label": f"Model {model}", "dtype": "bfloat16"}),
            task=Spec(f"task{task}", {"label": f"Task {task}"}),
            data=Spec("generated", {}, {"digest": f"{task}"}),
            method=Spec(f"method{method}", {"label": f"Method {method}", "budgeted": True}),
            protocol=Spec("quest_paper", {"tail": "question"}),
            budget=budget,
            page_size=16,
            dense_layers=2,
            seed=0,
        )
        for model, task in families
        for method in range(METHODS)
        for budget in BUDGETS
    ]


def _record(point: Point, sample: int) -> dict[str, Any]:
    budget = float(point.budget or 0)
    return {
        "point": point.key,
        "sample": sample,
        "score": float((int(point.key[:8], 16) + 13 * sample) % 101),
        "prediction": f"an answer as long as many are, to question {sample}",
        "reference": f"the answer to question {sample}",
        "attended": budget,
        "planned": budget,
        "read": 1.8 * budget,
        "context_tokens": 4096,
        "tail_tokens": 24,
        "new_tokens": 16,
        "truncated": False,
        "seconds": 0.4,
        "prefill_seconds": 3.0,
        "finished_at": 1_790_000_000.0 + 5 * sample,
        "error": None,
        "metric": "f1",
        "metrics": {"entropy": 1.5},
        "details": {},
    }


def _took(uri: str, folder: Path, points: Sequence[Point], samples: int) -> Took:
    expected = {point.key: samples for point in points}
    sweep = Sweep("tracking", "python -m quest_dist.bench tracking", device="cpu")
    found = Took()
    with Ledger(folder / "ledger.db") as ledger, _requests() as requests:
        ledger.add_points(points)
        tracker = Tracker({"uri": uri}, folder, sweep, ledger)
        _written(tracker.sync([]))  # makes the tables, or finds them
        requests[0] = 0
        rows: list[table.Row] = []
        for start in range(0, len(points), FAMILY):
            ledger.add(
                _record(point, sample)
                for point in points[start : start + FAMILY]
                for sample in range(samples)
            )
            began = time.perf_counter()
            rows = table.rows(points, ledger, expected)
            found.rows += time.perf_counter() - began
            seconds, _ = _timed(lambda: tracker.sync(rows), requests)  # noqa: B023
            found.syncs.append(seconds)
            done = f"{start + FAMILY} points, {sum(found.syncs):.0f} s"
            print(f"{uri.partition(':')[0]}: {done}", file=sys.stderr)
        found.requests = requests[0]
        _written(tracker.finish(rows))
        found.again = _timed(lambda: tracker.finish(rows), requests)
        new = Tracker({"uri": uri}, folder, sweep, ledger)
        found.anew = _timed(lambda: new.finish(rows), requests)
    found.runs = _runs(uri, new.experiment)
    return found


def _timed(write: Any, requests: list[int]) -> tuple[float, int]:
    """Seconds and requests of what says whether it was written."""
    before, began = requests[0], time.perf_counter()
    _written(write())
    return time.perf_counter() - began, requests[0] - before


def _written(success: bool) -> None:
    if not success:
        raise RuntimeError("the tracking store failed: see the warning above")


def _runs(uri: str, experiment: str) -> int:
    """Live runs of an experiment."""
    from quest_dist.mlflow_store import connect

    client = connect(uri)
    found, page = 0, ""
    made = client.get_experiment_by_name(experiment)
    number = made.experiment_id if made is not None else ""
    while True:
        runs = client.search_runs([number], max_results=1000, page_token=page or None)
        found, page = found + len(runs), runs.token or ""
        if not page:
            return found


@contextlib.contextmanager
def _requests() -> Iterator[list[int]]:
    """Yield a list of one number: the HTTP requests begun in this process since."""
    made = [0]
    put = http.client.HTTPConnection.putrequest

    def counted(*given: Any, **named: Any) -> Any:
        made[0] += 1
        return put(*given, **named)

    http.client.HTTPConnection.putrequest = counted  # type: ignore[method-assign]
    try:
        yield made
    finally:
        http.client.HTTPConnection.putrequest = put  # type: ignore[method-assign]


@contextlib.contextmanager
def _store(kind: str, folder: Path, database: str | None) -> Iterator[str]:
    """The address of an empty store; a server lives as long as this."""
    if kind == "sqlite":
        yield f"sqlite:///{folder}/mlflow.db"
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1"]
    command += ["--port", str(port), "--artifacts-destination", str(folder / "artifacts")]
    command += ["--backend-store-uri", database or f"sqlite:///{folder}/server.db"]
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(
            command,
            env=os.environ | SERVER_ENVIRONMENT,
            cwd=folder,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        _wait(server, port, folder / "server.log")
        yield f"http://127.0.0.1:{port}"
    finally:
        if (status := server.poll()) is not None:
            said = (folder / "server.log").read_text()[-1000:]
            print(f"the server ended by itself, status {status}: {said}", file=sys.stderr)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def _wait(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    ends = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return
        if server.poll() is not None or time.monotonic() > ends:
            raise ValueError(f"mlflow server did not start: {log.read_text()[-1000:]}")
        time.sleep(0.2)


def _report(
    options: argparse.Namespace,
    points: Sequence[Point],
    found: Mapping[str, Took],
    state: Mapping[str, Any],
) -> Report:
    rows: list[Sequence[Any]] = []
    summary: dict[str, Any] = {}
    for store, took in found.items():
        tenth = max(1, len(took.syncs) // 10)
        each = [1e3 * seconds / FAMILY for seconds in took.syncs]
        served = store == "server"
        ms = sum(each) / len(each)
        asked = took.requests / len(points) if served else None
        rows.append(
            (
                *(store, len(points), 1e3 * took.rows / len(points), ms),
                *(sum(each[:tenth]) / tenth, sum(each[-tenth:]) / tenth, asked),
                *(took.again[0], took.again[1] if served else None),
                *(took.anew[0], took.anew[1] if served else None, took.runs),
            )
        )
        summary |= {
            f"{store}_ms_per_point": ms,
            f"{store}_again_s": took.again[0],
            f"{store}_new_driver_s": took.anew[0],
            f"{store}_runs": took.runs,
        }
        if served:
            summary["server_requests_per_point"] = asked
    curves = len({(point.model.name, point.method.name) for point in points})
    return Report(
        name="what MLflow takes",
        columns=COLUMNS,
        rows=rows,
        summary=summary | {"runs_expected": len(points) + curves + 1},
        setting={
            "samples_per_point": options.samples,
            "points_per_sync": FAMILY,
            "server_database": (options.backend_store_uri or "sqlite").partition(":")[0],
            "server": "mlflow server --workers 1, on loopback, without job execution",
            "machine_state": dict(state),
        },
    )
