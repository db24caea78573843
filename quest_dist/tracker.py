"""MLflow: a copy of the sweep for people to look at, made from the ledger and never read back.

Used by the driver alone. To rebuild it, delete mlflow.db (or point to another store) and run the
same command again: nothing is computed twice, and everything is written.

Invariants:
* `sync` is idempotent: a second one adds no run and no metric value.
* Nothing that MLflow does reaches the sweep: a server that is away, broken or silent is one warning
  for as long as it lasts, and the first sync after it catches up.
* Other people's runs are not touched: runs are found by origin (who, where) and sweep.
"""

from __future__ import annotations

import functools
import getpass
import logging
import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

from quest_dist import mlflow_store, plan, projection, redact
from quest_dist.mlflow_store import Store
from quest_dist.projection import Sweep
from quest_dist.table import Record, Row, to_csv

__all__ = ["Sweep", "Tracker"]

log = logging.getLogger(__name__)
PAUSE = 10.0  # seconds without a try after the server failed


class Ledger(Protocol):
    """What is asked of the ledger."""

    def records(self, point: str) -> Sequence[Record]:
        """Records of a point key, by sample."""

    def identity(self, point: str) -> Mapping[str, Any] | None:
        """What a point key stands for."""


class Tracker:
    """A sweep's place in MLflow. `settings`: uri and experiment, either may be None.

    `texts` gives, of the rows, the artifacts of the sweep's run that everything can be drawn from
    again; they follow the points, so that a sweep that is killed leaves what it had.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        output_dir: Path,
        sweep: Sweep,
        ledger: Ledger,
        texts: Callable[[Sequence[Row]], Mapping[str, str]] = lambda rows: {
            "points.csv": to_csv(rows)
        },
    ) -> None:
        self.sweep, self.ledger = sweep, ledger
        self.output_dir = output_dir.resolve()
        local = f"sqlite:///{self.output_dir}/mlflow.db"
        self.uri = str(os.environ.get("MLFLOW_TRACKING_URI") or settings.get("uri") or local)
        self.local = self.uri == local
        named = os.environ.get("MLFLOW_EXPERIMENT_NAME") or settings.get("experiment")
        self.experiment = str(named or f"quest_dist/{sweep.name}")
        self.user = sweep.user or _user()
        # Asked of every row at every sync.
        self._identity = functools.cache(lambda point: self.ledger.identity(point))
        self._store: Store | None = None
        self._texts = texts
        self._shown: dict[str, Row] = {}  # point key -> its row as last synced
        self._logged: dict[str, str] = {}  # artifact -> its text as last synced
        self._failed_at: float | None = None  # None: the last try succeeded
        self._failed = False  # ever

    def connect(self) -> bool:
        """Reach the store, making its database where it is our own. As `sync` in all else."""
        return self._try(self._open)

    def sync(self, rows: Sequence[Row]) -> bool:
        """Bring MLflow up to the rows: finished and failed points, their curves, the progress.

        Returns False, after a warning, where it could not; never raises.
        """
        if self._failed_at is not None and time.monotonic() - self._failed_at < PAUSE:
            return False
        return self._try(lambda: self._sync(rows, closed=False))

    def finish(self, rows: Sequence[Row], files: Iterable[Path] = (), note: str = "") -> bool:
        """Sync once more, with partial points; add figures, tables and config; close the sweep."""
        if self._failed:
            self._store = None  # what was given up may have been done later: look again
        return self._try(lambda: self._finish(rows, list(files), note))

    def url(self, host: str = "http://127.0.0.1:5000") -> str:
        """Address of the sweep's curves: score against budget, as charts. Empty before a sync."""
        if self._store is None:
            return ""
        base = redact.text(self.uri).rstrip("/") if self.uri.startswith("http") else host
        wanted = f"tags.`quest.kind` = 'curve' and tags.`quest.sweep` = '{self.sweep.name}'"
        place = f"{base}/#/experiments/{self._store.experiment_id}/runs"
        return f"{place}?compareRunsMode=CHART&searchFilter={quote(wanted)}"

    def command(self) -> str:
        """What starts MLflow's pages on this store; empty where a server runs already."""
        if self.uri.startswith("http"):
            return ""
        told = redact.text(self.uri)
        if told != self.uri and self.uri == os.environ.get("MLFLOW_TRACKING_URI"):
            told = '"$MLFLOW_TRACKING_URI"'  # which the shell knows and nobody has to see
        return f"mlflow ui --workers 1 --backend-store-uri {told}"

    @property
    def artifacts(self) -> Path:
        """Where a database without a server keeps artifacts; inside `output_dir` by any name."""
        parts = [part for part in self.experiment.split("/") if part.strip(".")]
        return self.output_dir.joinpath("mlartifacts", *(parts or ["unnamed"]))

    def _try(self, write: Callable[[], object]) -> bool:
        """Write; once more, from what the store then has, unless it failed the last time too."""
        known = self._failed_at is not None
        for last in (True,) if known else (False, True):
            try:
                write()
            except Exception as error:  # whatever MLflow raises, the sweep goes on
                self._failed, self._failed_at, self._store = True, time.monotonic(), None
                first = (str(error).strip() or type(error).__name__).splitlines()[0]
                if last and not known:
                    told = redact.text(f"{self.uri}: {first}")
                    log.warning("MLflow at %s (results are safe; the next sync adds them)", told)
            else:
                self._failed_at = None
                return True
        return False

    def _open(self) -> Store:
        """Reach the store and learn which runs it has; free when that is done."""
        if self._store is None:
            # A server keeps artifacts itself; a bare database would put them where we stand.
            own = not self.uri.startswith(("http://", "https://", "databricks"))
            artifacts = self.artifacts if own else None
            self.output_dir.mkdir(parents=True, exist_ok=True)
            if self.local:
                mlflow_store.create(self.output_dir / "mlflow.db")
            client = mlflow_store.connect(self.uri)
            self._shown, self._logged = {}, {}
            self._store = Store(client, self.experiment, artifacts, self._tags())
        return self._store

    def _tags(self) -> dict[str, str]:
        """What every run of this sweep says of where it comes from."""
        where = [self.user, socket.gethostname(), str(self.output_dir)]
        return {
            **{f"mlflow.source.git.{k}": v for k, v in self.sweep.source.items() if v},
            "mlflow.source.name": self.sweep.command or "quest_dist.sweep",
            "mlflow.source.type": "LOCAL",
            "mlflow.user": self.user,
            "quest.sweep": self.sweep.name,
            # Our own store moves with its folder; a shared one holds other people's runs too.
            "quest.origin": "here" if self.local else plan.digest(where),
        }

    def _sync(self, rows: Sequence[Row], closed: bool, note: str = "") -> None:
        store = self._open()
        run_id = store.put(projection.sweep_run(rows, self.sweep, closed, note))
        for run in projection.curve_runs(rows, self._identity):
            store.put_curve(run)
        shown = {"finished", "failed", "partial"} if closed else {"finished", "failed"}
        for row in rows:
            before = self._shown.get(row.point)  # a row may hold NaN, which differs from itself
            if row.status in shown and before is not row and repr(before) != repr(row):
                identity = self._identity(row.point) or {}
                store.put(projection.point_run(row, identity, self.ledger.records(row.point)))
                self._shown[row.point] = row
        store.gather()
        for path, text in self._texts(rows).items():
            if self._logged.get(path) != text:
                store.log_text(run_id, text, path)
                self._logged[path] = text

    def _finish(self, rows: Sequence[Row], files: list[Path], note: str) -> None:
        store = self._open()
        run_id = store.put(projection.sweep_run(rows, self.sweep, closed=False))
        drawn = {path.stem for path in files if path.suffix == ".png"}
        texts = {Path(path).name for path in self._texts(rows)}
        for path in files:
            if path.name not in texts:
                folder = "figures" if path.stem in drawn else None
                store.client.log_artifact(run_id, str(path), folder)
        if self.sweep.config:
            store.log_text(run_id, self.sweep.config, "config.yaml")
        pictures = [path for path in files if path.stem in drawn]
        self._sync(rows, closed=True, note=self._closing(run_id, note, pictures))

    def _closing(self, run_id: str, note: str, pictures: Iterable[Path]) -> str:
        """The note, links to the figures, and the command that made them."""
        place = f"#/experiments/{self._open().experiment_id}/runs/{run_id}/artifacts/figures"
        links = [f"[{p.name}]({place}/{quote(p.name)})" for p in pictures]
        command = f"```\n{self.sweep.command}\n```" if self.sweep.command else ""
        return "\n\n".join(part for part in (" · ".join(links), note, command) if part)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return "unknown"
