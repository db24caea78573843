"""Runs in an MLflow store: written so that they become what `projection` describes.

The only file that imports mlflow. Its state lives in the store itself: a run carries the key of
what it shows and, written last, the digest of what was logged. So a crash between any two calls, a
deleted database or another server are one case: whatever is missing is written, nothing twice.

Invariants: at most one live run a (kind, key) of this sweep and origin, once opened; a run that
carries the digest of its description holds all of it; runs of others are never touched.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlparse

from quest_dist.projection import Dataset, Run

if TYPE_CHECKING:
    from mlflow import MlflowClient

BATCH = 900  # metrics in one request; MLflow takes 1000
LONGEST_TAG = 5000  # characters; older servers take no more
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # two lines a run, where there is a server
    # 7 tries of 120 s would take a quarter of an hour. None here: a request repeated blindly makes
    # a run twice; whoever tries again (tracker) looks first at what is there.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
ABOUT = (
    "KV-cache methods by token budget. Curves are at the top level (in their charts, step is the "
    "budget), points are their children, and a sweep's own run holds its figures."
)


def connect(uri: str) -> MlflowClient:
    """A client that neither waits long, nor chats, nor reports usage."""
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    for noisy in ("alembic", "mlflow.store.db.utils", "mlflow.tracking.fluent"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def create(path: Path) -> None:
    """Make MLflow's SQLite file, unless it is there; for one process at a time.

    It appears whole or not at all: killed while it makes its tables, MLflow would leave some that
    it can neither use nor complete.
    """
    if path.exists():
        return
    folder = path.with_name(f".{path.name}.new")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    made = folder / path.name
    connect(f"sqlite:///{made}").search_experiments(max_results=1)
    made.rename(path)
    shutil.rmtree(folder, ignore_errors=True)


@dataclass
class Seen:
    """What the store is known to hold of a run; `dots` of a curve, once asked or written."""

    run_id: str
    digest: str = ""
    status: str = ""
    curve: str = ""
    parent: str = ""
    dots: dict[tuple[str, int], float] | None = None


class Store:
    """The runs of one sweep and origin in one experiment. `tags` go on every run."""

    def __init__(
        self, client: MlflowClient, experiment: str, artifacts: Path | None, tags: Mapping[str, str]
    ) -> None:
        self.client, self.tags = client, dict(tags)
        found = client.get_experiment_by_name(experiment)
        if found is not None:
            self.experiment_id = str(found.experiment_id)
        else:
            self.experiment_id = _created(client, experiment, artifacts)
        place = urlparse(client.get_experiment(self.experiment_id).artifact_location)
        local = artifacts is not None and place.scheme == "file" and not place.netloc
        self._folder = Path(unquote(place.path)) if local else None
        self._known: dict[tuple[str, str], Seen] = {}
        mine = [f"tags.`{name}` = '{self.tags[name]}'" for name in ("quest.origin", "quest.sweep")]
        page: str | None = ""
        while page is not None:
            runs = client.search_runs(
                [self.experiment_id], " and ".join(mine), max_results=1000, page_token=page or None
            )
            for run in runs:
                tagged = run.data.tags
                name = (tagged.get("quest.kind", ""), tagged.get("quest.key", ""))
                seen = Seen(run.info.run_id, tagged.get("quest.digest", ""), run.info.status)
                seen.curve = tagged.get("quest.curve", "")
                seen.parent = tagged.get("mlflow.parentRunId", "")
                self._learn(name, seen)
            page = runs.token or None

    def _learn(self, name: tuple[str, str], seen: Seen) -> None:
        """Note a run. A second of one name is deleted: a server made it and died, or was given up,
        before it said so."""
        other = self._known.setdefault(name, seen)
        if other is not seen:
            kept, left = (seen, other) if seen.digest and not other.digest else (other, seen)
            self._known[name] = kept
            self.client.delete_run(left.run_id)

    def put(self, run: Run) -> str:
        """Make the store show a run, whatever of it is there already; return its id."""
        name = (run.kind, run.key)
        seen, tags = self._known.get(name), self._tags(run)
        if seen is None:
            seen = self._known[name] = Seen(self._create(run, tags), status="RUNNING")
            tags = {}
        if seen.digest != run.digest:
            self._write(seen.run_id, run, tags, seen.dots or {})
        elif seen.status == run.status:
            return seen.run_id
        if not seen.status == run.status == "RUNNING":
            self._close(seen.run_id, run)
        tags = self._tags(run)
        parent, curve = tags.get("mlflow.parentRunId", ""), tags.get("quest.curve", "")
        self._known[name] = Seen(seen.run_id, run.digest, run.status, curve, parent)
        return seen.run_id

    def put_curve(self, run: Run) -> None:
        """As `put`; but a dot that moved (its point has more samples) makes a new run.

        MLflow cannot take a value back, and both would stand in the chart, so the old run is
        deleted (which MLflow can undo); `gather` gives its children to the new one.
        """
        name = (run.kind, run.key)
        seen = self._known.get(name)
        if seen is not None and seen.digest == run.digest:
            self.put(run)
            return
        shown: dict[tuple[str, int], float] = {}
        if seen is not None:
            shown = self._dots(seen.run_id) if seen.dots is None else seen.dots
            seen.dots = shown
        dots = {(metric, step): value for metric, value, step, _ in run.metrics}
        if seen is not None and any(shown.get(dot, v) != v for dot, v in dots.items()):
            self.client.delete_run(seen.run_id)
            del self._known[name]
            shown = {}
        self.put(run)
        self._known[name].dots = shown | dots

    def _dots(self, run_id: str) -> dict[tuple[str, int], float]:
        """Every value that a run shows: a request a metric."""
        return {
            (name, metric.step): metric.value
            for name in self.client.get_run(run_id).data.metrics
            for metric in self.client.get_metric_history(run_id, name)
        }

    def gather(self) -> None:
        """Give points whose curve's run is gone, or came later, to the run it has now."""
        for seen in self._known.values():
            parent = self._known.get(("curve", seen.curve))
            if parent is not None and seen.parent != parent.run_id:
                self.client.set_tag(seen.run_id, "mlflow.parentRunId", parent.run_id)
                seen.parent = parent.run_id

    def _create(self, run: Run, tags: Mapping[str, str]) -> str:
        created = self.client.create_run(
            self.experiment_id, start_time=run.started, tags=dict(tags), run_name=run.name
        )
        return str(created.info.run_id)

    def _write(
        self,
        run_id: str,
        run: Run,
        tags: Mapping[str, str],
        held: Mapping[tuple[str, int], float],
    ) -> None:
        """Artifacts, then values, then (MLflow writes tags last) the digest that says it is all.

        Dots that a curve's run is known to hold (`held`) are not sent again.
        """
        from mlflow.entities import Metric, Param, RunTag

        if run.datasets:
            self.client.log_inputs(run_id, datasets=list(map(_input, run.datasets)))
        if run.samples is not None:
            self.log_text(run_id, json.dumps(run.samples, ensure_ascii=False), "samples.json")
        metrics = [Metric(n, v, at, s) for n, v, s, at in run.metrics if held.get((n, s)) != v]
        while len(metrics) > BATCH:
            self.client.log_batch(run_id, metrics=metrics[:BATCH])
            metrics = metrics[BATCH:]
        params = [Param(name, value) for name, value in run.params.items()]
        noted = [RunTag(k, v) for k, v in {**tags, "quest.digest": run.digest}.items()]
        self.client.log_batch(run_id, metrics, params, noted)

    def log_text(self, run_id: str, text: str, name: str) -> None:
        """Make a text an artifact of a run.

        Where the experiment keeps artifacts in a folder of this machine, it is written there:
        MLflow would read the run from its store to find the same.
        """
        if self._folder is None:
            self.client.log_text(run_id, text, name)
            return
        path = self._folder / run_id / "artifacts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def _close(self, run_id: str, run: Run) -> None:
        if run.status == "RUNNING":
            self.client.update_run(run_id, status="RUNNING")
        else:
            self.client.set_terminated(run_id, run.status, end_time=run.ended)

    def _tags(self, run: Run) -> dict[str, str]:
        tags = {
            **self.tags,
            **run.tags,
            "mlflow.runName": run.name,
            "quest.kind": run.kind,
            "quest.key": run.key,
        }
        if run.samples is not None:
            shown = [{"path": "samples.json", "type": "table"}]
            tags["mlflow.loggedArtifacts"] = json.dumps(shown)
        if run.parent:
            tags["quest.curve"] = run.parent
        if ("curve", run.parent) in self._known:
            tags["mlflow.parentRunId"] = self._known["curve", run.parent].run_id
        return {name: value[:LONGEST_TAG] for name, value in tags.items()}


def _created(client: MlflowClient, experiment: str, artifacts: Path | None) -> str:
    """A new experiment's id; that of another launch's, where it was made meanwhile."""
    from mlflow.exceptions import MlflowException

    try:
        return client.create_experiment(
            experiment,
            artifact_location=artifacts.as_uri() if artifacts else None,
            tags={
                "mlflow.note.content": ABOUT,
                "mlflow.experimentKind": "custom_model_development",
            },
        )
    except MlflowException:
        found = client.get_experiment_by_name(experiment)
        if found is None:
            raise
        return str(found.experiment_id)


def _input(dataset: Dataset) -> Any:
    from mlflow.entities import Dataset as Entity
    from mlflow.entities import DatasetInput, InputTag

    source = json.dumps({"data": dataset.source})
    entity = Entity(dataset.name, dataset.digest, "local", source)
    return DatasetInput(entity, [InputTag("mlflow.data.context", "eval")])
