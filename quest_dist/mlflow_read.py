"""Sweeps in an MLflow store: found, and the texts that they left, read back.

Nothing is written, and no store is made. A sweep's run is the newest of its name, whoever ran it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quest_dist.mlflow_store import connect
from quest_dist.suggest import did_you_mean

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

SQLITE = "sqlite:///"
MANY = 1000  # runs, or experiments, in one answer


@dataclass(frozen=True)
class Found:
    """A sweep's run: its name, who ran what, its MLflow status, and its artifacts by path."""

    name: str
    run_id: str
    user: str
    command: str
    status: str
    text: Callable[[str], str]


def address(uri: str) -> str:
    """The URI of a store that is there; a path to a database is one too.

    Raises ValueError for a database that does not exist: MLflow would make it.
    """
    if "://" not in uri:
        uri = f"{SQLITE}{Path(uri).expanduser().absolute()}"
    if uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE)).is_file():
        raise ValueError(
            f"no tracking store at {uri.removeprefix(SQLITE)}; name one with --tracking, as in"
            " --tracking outputs/mlflow.db or --tracking http://127.0.0.1:5000"
        )
    return uri


def newest(uri: str, name: str | None) -> Found:
    """The newest sweep of a name, or of all names.

    Raises ValueError where there is no such sweep or the store cannot be read.
    """
    from mlflow.exceptions import MlflowException

    uri = address(uri)
    try:
        client = connect(uri)
        runs = _sweeps(client)
    except MlflowException as error:
        raise ValueError(f"tracking store {uri}: {_first_line(error)}") from error
    names = sorted({run.data.tags["quest.sweep"] for run in runs})
    if not runs:
        raise ValueError(f"tracking store {uri}: no sweep in it")
    if name is not None and name not in names:
        raise ValueError(f"no sweep '{name}' in {uri}; {did_you_mean(name, names)}")
    named = [run for run in runs if name in (None, run.data.tags["quest.sweep"])]
    run = max(named, key=_ended)
    tags = run.data.tags

    def text(path: str) -> str:
        """An artifact of the run; ValueError where it cannot be had."""
        with tempfile.TemporaryDirectory() as folder:
            try:
                kept = client.download_artifacts(run.info.run_id, path, folder)
                return Path(kept).read_text(encoding="utf-8")
            except (MlflowException, OSError) as error:
                said = f"sweep '{tags['quest.sweep']}' (run {run.info.run_id}) has no {path}"
                how = tags.get("mlflow.source.name", "its command")
                raise ValueError(
                    f"{said}: {_first_line(error)}; to write it, computing nothing twice: {how}"
                ) from error

    return Found(
        name=tags["quest.sweep"],
        run_id=run.info.run_id,
        user=tags.get("mlflow.user", ""),
        command=tags.get("mlflow.source.name", ""),
        status=run.info.status,
        text=text,
    )


def _sweeps(client: MlflowClient) -> list[Run]:
    """All live runs of sweeps themselves."""
    experiments: list[str] = []
    page: str | None = ""
    while page is not None:
        some = client.search_experiments(max_results=MANY, page_token=page or None)
        experiments += [found.experiment_id for found in some]
        page = some.token or None
    runs: list[Run] = []
    page = ""
    while page is not None and experiments:
        kind = "tags.`quest.kind` = 'sweep'"
        found = client.search_runs(experiments, kind, max_results=MANY, page_token=page or None)
        runs += [run for run in found if "quest.sweep" in run.data.tags]
        page = found.token or None
    return runs


def _ended(run: Run) -> tuple[int, str]:
    """When a sweep's newest record was made; one that never closed goes by its last progress."""
    progress = run.data.metrics.get("progress")
    ended = run.info.end_time or run.info.start_time or 0
    return (int(ended), f"{progress} {run.info.run_id}")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
