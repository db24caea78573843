"""MLflow: a copy of the sweep for people to look at, made from the ledger and never read back.

This is the only door to mlflow, used by the driver alone.

Invariants:
* `sync` is idempotent: what is in the store already is not written again; a second sync adds no run
  and no metric value. Its state lives in the store itself: each run carries the key of what it
  shows and, written last, the digest of what was logged. So a crash at any point, a deleted
  mlflow.db or another server are all the same case: the next sync writes what is missing.
* Nothing that MLflow does reaches the sweep: an unreachable or broken server is a warning, and the
  next sync catches up.
* Other people's runs are not touched: runs are found by origin (who, where) and sweep.
"""

from __future__ import annotations

import getpass
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote

from quest_dist import plan, projection
from quest_dist.projection import Run, Sweep
from quest_dist.table import Record, Row, to_csv

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as Stored

log = logging.getLogger(__name__)
PAUSE = 30.0  # seconds without a try after the server failed
BATCH = 900  # metrics in one request; MLflow takes 1000
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # 7 would block the sweep for minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}


class Ledger(Protocol):
    """What is asked of the ledger."""

    def records(self, point: str) -> Sequence[Record]:
        """Records of a point key, by sample."""

    def identity(self, point: str) -> Mapping[str, Any] | None:
        """What a point key stands for."""


class Tracker:
    """A sweep's place in MLflow. `settings`: uri and experiment, either may be None."""

    def __init__(
        self, settings: Mapping[str, Any], output_dir: Path, sweep: Sweep, ledger: Ledger
    ) -> None:
        self.sweep, self.ledger = sweep, ledger
        self.output_dir = output_dir.resolve()
        local = f"sqlite:///{self.output_dir}/mlflow.db"
        self.uri = os.environ.get("MLFLOW_TRACKING_URI") or settings.get("uri") or local
        named = os.environ.get("MLFLOW_EXPERIMENT_NAME") or settings.get("experiment")
        self.experiment = str(named or f"quest_dist/{sweep.name}")
        self.local = self.uri == local
        self.user = sweep.user or _user()
        where = [self.user, socket.gethostname(), str(self.output_dir)]
        self.origin = "here" if self.local else plan.digest(where)
        self.experiment_id = ""
        self._client: MlflowClient | None = None
        self._known: dict[tuple[str, str], Stored] = {}
        self._shown: dict[str, str] = {}  # point -> its row as last synced
        self._failed_at: float | None = None

    def sync(self, rows: Sequence[Row]) -> bool:
        """Bring MLflow up to the rows: finished and failed points, their curves, the progress.

        Returns False, after a warning, where it could not; never raises.
        """
        if self._failed_at is not None and time.monotonic() - self._failed_at < PAUSE:
            return False
        return self._try(lambda: self._sync(rows, closed=False))

    def finish(self, rows: Sequence[Row], files: Iterable[Path] = (), note: str = "") -> bool:
        """Sync once more, with partial points; add figures, tables and config; close the sweep."""
        return self._try(lambda: self._finish(rows, list(files), note))

    def url(self, host: str = "http://127.0.0.1:5000") -> str:
        """Address of the sweep's curves: score against budget, as charts."""
        base = self.uri.rstrip("/") if self.uri.startswith("http") else host
        wanted = f"tags.`quest.kind` = 'curve' and tags.`quest.sweep` = '{self.sweep.name}'"
        place = f"{base}/#/experiments/{self.experiment_id}/runs"
        return f"{place}?compareRunsMode=CHART&searchFilter={quote(wanted)}"

    def command(self) -> str:
        """What starts MLflow's pages on this store; empty where a server runs already."""
        if self.uri.startswith("http"):
            return ""
        return f"mlflow ui --workers 1 --backend-store-uri {self.uri}"

    def _try(self, write: Callable[[], None]) -> bool:
        try:
            write()
        except Exception as error:  # whatever MLflow raises, the sweep goes on
            self._failed_at, self._client = time.monotonic(), None
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            log.warning("MLflow at %s: %s (the ledger has all; next time)", self.uri, first)
            return False
        self._failed_at = None
        return True

    def _sync(self, rows: Sequence[Row], closed: bool, note: str = "") -> None:
        self._open()
        self._put(projection.sweep_run(rows, self.sweep, closed, note))
        for run in projection.curve_runs(rows):
            self._put_curve(run)
        shown = {"finished", "failed", "partial"} if closed else {"finished", "failed"}
        for row in rows:
            if row.status in shown and self._shown.get(row.point) != repr(row):
                identity = self.ledger.identity(row.point) or {}
                self._put(projection.point_run(row, identity, self.ledger.records(row.point)))
                self._shown[row.point] = repr(row)
        self._gather()

    def _finish(self, rows: Sequence[Row], files: list[Path], note: str) -> None:
        self._open()
        run_id = self._put(projection.sweep_run(rows, self.sweep, closed=False))
        client = self._opened()
        for path in files:
            folder = "figures" if path.suffix in (".png", ".pdf", ".csv", ".svg") else None
            client.log_artifact(run_id, str(path), folder)
        client.log_text(run_id, to_csv(rows), "points.csv")
        if self.sweep.config:
            client.log_text(run_id, self.sweep.config, "config.yaml")
        self._sync(rows, closed=True, note=self._with_pictures(run_id, note, files))

    def _with_pictures(self, run_id: str, note: str, files: Iterable[Path]) -> str:
        """The note, the figures below it, and the command that made them."""
        pictures = [
            f"![{path.stem}](get-artifact?path=figures/{quote(path.name)}&run_uuid={run_id})"
            for path in files
            if path.suffix == ".png"
        ]
        command = f"```\n{self.sweep.command}\n```" if self.sweep.command else ""
        return "\n\n".join(part for part in (note, *pictures, command) if part)

    def _open(self) -> None:
        """Reach the store and learn which runs it has; cheap when that is done."""
        if self._client is not None:
            return
        for key, value in ENVIRONMENT.items():
            os.environ.setdefault(key, value)
        if self.local:
            self.output_dir.mkdir(parents=True, exist_ok=True)
        for noisy in ("alembic", "mlflow.store.db.utils", "mlflow.tracking.fluent"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=self.uri)
        found = client.get_experiment_by_name(self.experiment)
        if found is None:
            folder = (self.output_dir / "mlartifacts" / self.experiment).as_uri()
            self.experiment_id = client.create_experiment(
                self.experiment,
                artifact_location=folder if self.local else None,
                tags={
                    "mlflow.note.content": "KV-cache methods by token budget. Curves are at the "
                    "top level (in their charts, step is the budget), points are their children, "
                    "and a sweep's run holds its figures.",
                    "mlflow.experimentKind": "custom_model_development",
                },
            )
        else:
            self.experiment_id = found.experiment_id
        self._known, self._shown = {}, {}
        mine = f"tags.`quest.origin` = '{self.origin}' and tags.`quest.sweep` = '{self.sweep.name}'"
        page: str | None = ""
        while page is not None:
            runs = client.search_runs(
                [self.experiment_id],
                mine,
                max_results=1000,
                order_by=["attributes.start_time ASC"],
                page_token=page or None,
            )
            for run in runs:
                tags = run.data.tags
                name = (tags.get("quest.kind", ""), tags.get("quest.key", ""))
                self._known.setdefault(name, run)
            page = runs.token or None
        self._client = client

    def _opened(self) -> MlflowClient:
        assert self._client is not None
        return self._client

    def _put(self, run: Run) -> str:
        """Make the store show a run, whatever of it is there already; return its id."""
        stored = self._known.get((run.kind, run.key))
        if stored is None:
            stored = self._create(run)
        run_id = str(stored.info.run_id)
        tags = self._tags(run)
        if stored.data.tags.get("quest.digest") != tags["quest.digest"]:
            self._write(run_id, run, tags)
        elif stored.info.status == run.status:
            return run_id
        self._close(run_id, run)
        self._known[run.kind, run.key] = self._opened().get_run(run_id)
        return run_id

    def _put_curve(self, run: Run) -> None:
        """As `_put`; but a dot that moved (its point has more samples) makes a new run.

        MLflow cannot take a value back, and both would stand in the chart, so the old run is
        deleted (which MLflow can undo); `_gather` gives its children to the new one.
        """
        stored = self._known.get((run.kind, run.key))
        if stored is None or stored.data.tags.get("quest.digest") == run.digest:
            self._put(run)
            return
        run_id = str(stored.info.run_id)
        logged = {
            (name, metric.step): metric.value
            for name in stored.data.metrics
            for metric in self._opened().get_metric_history(run_id, name)
        }
        if all(logged.get((name, step), value) == value for name, value, step, _ in run.metrics):
            missing = tuple(m for m in run.metrics if (m[0], m[2]) not in logged)
            self._write(run_id, replace(run, metrics=missing), self._tags(run))
            self._close(run_id, run)
            self._known[run.kind, run.key] = self._opened().get_run(run_id)
            return
        self._opened().delete_run(run_id)
        del self._known[run.kind, run.key]
        self._put(run)

    def _gather(self) -> None:
        """Give points whose curve's run is gone, or came later, to the run it has now."""
        for name, stored in self._known.items():
            parent = self._known.get(("curve", stored.data.tags.get("quest.curve", "")))
            if parent is None:
                continue
            wanted, run_id = parent.info.run_id, stored.info.run_id
            if stored.data.tags.get("mlflow.parentRunId") != wanted:
                self._opened().set_tag(run_id, "mlflow.parentRunId", wanted)
                self._known[name] = self._opened().get_run(run_id)

    def _create(self, run: Run) -> Stored:
        tags = {name: value for name, value in self._tags(run).items() if name != "quest.digest"}
        created = self._opened().create_run(
            self.experiment_id, start_time=run.started, tags=tags, run_name=run.name
        )
        self._known[run.kind, run.key] = created
        return created

    def _write(self, run_id: str, run: Run, tags: Mapping[str, str]) -> None:
        """Artifacts, then values, then the digest that says all of it is there."""
        from mlflow.entities import Metric, Param, RunTag

        client = self._opened()
        if run.dataset is not None:
            client.log_inputs(run_id, datasets=[_input(run.dataset)])
        if run.samples is not None:
            client.log_text(run_id, json.dumps(run.samples, ensure_ascii=False), "samples.json")
        metrics = [Metric(name, value, at, step) for name, value, step, at in run.metrics]
        for start in range(0, len(metrics), BATCH):
            client.log_batch(run_id, metrics=metrics[start : start + BATCH])
        params = [Param(name, value) for name, value in run.params.items()]
        last = [RunTag(name, value) for name, value in tags.items()]
        client.log_batch(run_id, params=params, tags=last)

    def _close(self, run_id: str, run: Run) -> None:
        if run.status == "RUNNING":
            self._opened().update_run(run_id, status="RUNNING")
        else:
            self._opened().set_terminated(run_id, run.status, end_time=run.ended)

    def _tags(self, run: Run) -> dict[str, str]:
        source = {f"mlflow.source.git.{k}": v for k, v in self.sweep.source.items() if v}
        tags = {
            **run.tags,
            **source,
            "mlflow.source.name": self.sweep.command or "quest_dist.sweep",
            "mlflow.source.type": "LOCAL",
            "mlflow.user": self.user,
            "mlflow.runName": run.name,
            "quest.kind": run.kind,
            "quest.key": run.key,
            "quest.sweep": self.sweep.name,
            "quest.origin": self.origin,
            "quest.digest": run.digest,
        }
        if run.samples is not None:
            shown = [{"path": "samples.json", "type": "table"}]
            tags["mlflow.loggedArtifacts"] = json.dumps(shown)
        if run.parent:
            tags["quest.curve"] = run.parent
        if ("curve", run.parent) in self._known:
            tags["mlflow.parentRunId"] = self._known["curve", run.parent].info.run_id
        return {name: value[:5000] for name, value in tags.items()}


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return "unknown"


def _input(dataset: projection.Dataset) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source = json.dumps({"data": dataset.source})
    entity = Dataset(dataset.name, dataset.digest, "local", source)
    return DatasetInput(entity, [InputTag("mlflow.data.context", "eval")])
