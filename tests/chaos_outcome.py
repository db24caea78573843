"""What chaos looks at afterwards and how it says what it found."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from quest_dist import mlflow_store

ALL_RUNS = 3  # deleted ones too: only curves may be made again


def mlflow_problems(store: Path, points: Iterable[str], samples: int) -> list[str]:
    """What is wrong with the points in MLflow: each should be there once, finished, with one value
    of each metric at `samples` samples."""
    client = mlflow_store.connect(f"sqlite:///{store}")
    experiment = client.get_experiment_by_name("quest_dist/tiny")
    if experiment is None:
        return ["MLflow has no experiment"]
    found = client.search_runs(
        [experiment.experiment_id], run_view_type=ALL_RUNS, max_results=10_000
    )
    runs = [run for run in found if run.data.tags.get("quest.kind") == "point"]
    problems = []
    logged, wanted = Counter(run.data.tags["quest.point"] for run in runs), Counter(points)
    if logged != wanted:
        problems.append(f"MLflow has {logged.total()} points for {wanted.total()}")
    if states := {run.info.status for run in runs} - {"FINISHED"}:
        problems.append(f"MLflow has points that are {', '.join(sorted(states))}")
    for run in runs:
        for name in run.data.metrics:
            steps = Counter(m.step for m in client.get_metric_history(run.info.run_id, name))
            if max(steps) != samples or max(steps.values()) > 1:
                problems.append(f"MLflow has {name} of {run.info.run_name} at {dict(steps)}")
    return problems


def spread(found: list[float]) -> dict[str, float]:
    """Seconds, summed up."""
    if not found:
        return {"n": 0}
    middle, most = statistics.median(found), max(found)
    return {"n": len(found), "median": round(middle, 1), "most": round(most, 1)}


def told(result: dict[str, Any]) -> str:
    """A result in a few lines."""

    def said(spread: dict[str, float]) -> str:
        if not spread["n"]:
            return "(never seen)"
        return f"{spread['median']} s (at most {spread['most']}, of {spread['n']})"

    kills = ", ".join(f"{n} {kind}" for kind, n in sorted(result["kills"].items()))
    lost, count = result["samples_begun_for_nothing"], sum(result["kills"].values())
    gone = result["seconds_until_gone"]
    return "\n".join(
        [
            f"{count} kills ({kills}), {result['launches']} launches",
            f"{result['samples']} samples of {result['points']} points; {lost} more were begun for"
            f" nothing ({lost / max(count, 1):.2f} a kill)",
            *(
                f"{kind} killed: {said(spread)} until a new process evaluates"
                for kind, spread in result["seconds_to_a_new_process_that_evaluates"].items()
            ),
            f"driver or raylet killed: {said(gone['workers'])} until no worker is left,"
            f" {said(gone['every process'])} until no process is",
            *(f"FAILED: {problem}" for problem in result["problems"]),
        ]
    )
