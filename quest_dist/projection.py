"""What MLflow should show of a sweep: plain descriptions of runs, computed from rows and records.

Invariants: pure and deterministic, so the same ledger gives the same runs in any store, whenever:
times are the records' own. Three kinds of runs, all of one sweep:
    point  one point, a child of its curve. Metrics are logged at step = samples scored, so a point
           that grows keeps its history and shows its latest value.
    curve  one method under one model, data and protocol, over all its tasks and budgets, at the top
           level. Metrics are called <what>/<task> and logged at step = budget, so the charts of the
           runs page are score against budget, a line a method, without set-up. (They are sorted by
           name: score comes first.) Full has no budget: its value stands at each.
    sweep  one sweep: progress, figures, tables, configuration and what follows from them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any

from quest_dist import plan
from quest_dist.table import Record, Row

#: What of a point's identity is settings that a person chooses between.
SETTINGS = ("protocol", "method", "model")
LONGEST_TEXT = 500  # MLflow takes 6000 of a parameter; a person reads less
OUTCOME = ("sample", "score", "prediction", "reference")
COST = ("attended", "context_tokens", "new_tokens", "seconds")


@dataclass(frozen=True)
class Sweep:
    """What is known of a sweep beside its points. `source`: git commit, branch and repository;
    `device`: where its workers compute."""

    name: str
    command: str = ""
    config: str = ""  # YAML, as composed
    about: str = ""
    user: str = ""
    source: Mapping[str, str] = field(default_factory=dict)
    device: str = ""


@dataclass(frozen=True)
class Dataset:
    """What a point read: a name, a digest of at most 36 characters, and where it came from."""

    name: str
    digest: str
    source: str


@dataclass(frozen=True)
class Run:
    """One MLflow run as it should be. Times in milliseconds since 1970."""

    kind: str
    key: str
    name: str
    status: str
    started: int
    ended: int
    metrics: tuple[tuple[str, float, int, int], ...]  # name, value, step, time
    params: Mapping[str, str]
    tags: Mapping[str, str]
    parent: str = ""  # key of the curve
    datasets: tuple[Dataset, ...] = ()
    samples: Mapping[str, Any] | None = None  # a table, columns and data

    @cached_property
    def digest(self) -> str:
        """A name for all of the above: equal digests need no writing."""
        plain = {part.name: getattr(self, part.name) for part in fields(self)}
        plain["datasets"] = [asdict(dataset) for dataset in self.datasets]
        plain["metrics"] = [list(metric) for metric in self.metrics]
        return plan.digest(plain)


def curve_key(row: Row, identity: Mapping[str, Any]) -> str:
    """The key of the curve a row belongs to: all it stands for (`identity`) but task and budget, so
    that launches with other settings of a method do not meet in one line."""
    own = (row.method, row.label, row.page_size, row.dense_layers)
    settings = [identity.get(group) for group in SETTINGS]
    return plan.digest([list(map(str, row.setting)), list(map(str, own)), settings])


def point_run(row: Row, identity: Mapping[str, Any], records: Sequence[Record]) -> Run:
    """The run of one point that has records."""
    ended = _ms(row.finished_at)
    found = {
        "score": row.score,
        "score_low": row.low,
        "score_high": row.high,
        "delta_full": row.delta,
        "delta_full_low": row.delta_low,
        "delta_full_high": row.delta_high,
        "n": float(row.n),
        "budget": float(row.budget) if row.budget is not None else math.nan,
        "attended": row.attended,
        "planned": row.planned,
        "read": row.read,
        "context_tokens": row.context_tokens,
        "new_tokens": row.new_tokens,
        "truncated": float(row.truncated),
        "seconds": row.seconds,
        **_details(records),
    }
    spent = [float(r["seconds"]) + float(r["prefill_seconds"] or 0.0) for r in records]
    first = min(float(r["finished_at"]) - s for r, s in zip(records, spent, strict=True))
    budget = "all tokens" if row.budget is None else f"{row.budget} tokens"
    text = f"**{row.label}** at {budget} on **{row.task_label}**, {row.model_label}: {_said(row)}"
    tags = {
        "mlflow.note.content": text,
        "quest.point": row.point,
        "quest.task": row.task,
        "quest.budget": "" if row.budget is None else str(row.budget),
        **_shared(row),
    }
    if row.error:
        tags["quest.error"] = row.error
    status = {"finished": "FINISHED", "failed": "FAILED"}.get(row.status, "KILLED")
    short = "" if row.budget is None else f" b{row.budget}"
    return Run(
        kind="point",
        key=row.point,
        name=f"{row.label}{short} · {row.task_label}",
        status=status,
        started=_ms(first),
        ended=ended,
        metrics=tuple((k, v, row.n, ended) for k, v in found.items() if not math.isnan(v)),
        params=_params(row, identity),
        tags=tags,
        parent=curve_key(row, identity),
        samples=_samples(records),
    )


def curve_runs(
    rows: Sequence[Row], identity: Callable[[str], Mapping[str, Any] | None]
) -> list[Run]:
    """One run a method and setting that has points to show; its dots are the finished ones.

    It names the data of its points (`identity` is what a point key stands for): a call to MLflow a
    point would cost as much as its values do. Curves that start together do so a millisecond apart,
    the last of the grid first: MLflow's charts show the ten newest.
    """
    grouped: dict[str, list[Row]] = {}
    places: dict[str, int] = {}
    for row in rows:
        key = curve_key(row, identity(row.point) or {})
        places.setdefault(key, len(places))
        if row.status != "missing":
            grouped.setdefault(key, []).append(row)
    pages = len({row.page_size for row in rows if row.budget is not None}) > 1
    dense = len({row.dense_layers for row in rows if row.budget is not None}) > 1
    models = len({row.model for row in rows}) > 1
    runs = []
    for key, members in grouped.items():
        first = members[0]
        name = first.label + (f" · {first.model_label}" if models else "")
        if first.budget is not None:
            name += f" · page {first.page_size}" if pages else ""
            name += f" · {first.dense_layers} dense" if dense else ""
        times = [_ms(row.finished_at) for row in members]
        tasks = list(dict.fromkeys(row.task_label for row in members))
        runs.append(
            Run(
                kind="curve",
                key=key,
                name=name,
                status="FAILED" if any(row.status == "failed" for row in members) else "FINISHED",
                started=min(at - _ms(row.seconds) for at, row in zip(times, members, strict=True))
                - places[key],
                ended=max(times),
                metrics=tuple(
                    m for row in members if row.status == "finished" for m in _dots(row, rows)
                ),
                params={
                    name: value
                    for name, value in _params(first, identity(first.point) or {}).items()
                    if name not in ("task", "budget")
                },
                tags={
                    "mlflow.note.content": f"**{first.label}** over {', '.join(tasks)}. In the "
                    "charts, step is the token budget.",
                    **_shared(first),
                },
                datasets=_datasets(members, identity),
            )
        )
    return runs


def sweep_run(rows: Sequence[Row], sweep: Sweep, closed: bool, note: str = "") -> Run:
    """The run of the sweep itself; RUNNING until it is closed."""
    times = [_ms(row.finished_at) for row in rows if not math.isnan(row.finished_at)]
    done, asked = sum(row.n for row in rows), sum(max(row.n, row.n_expected) for row in rows)
    counts = {s: sum(row.status == s for row in rows) for s in ("finished", "failed", "partial")}
    status = "RUNNING"
    if closed:
        status = "FINISHED" if counts["finished"] == len(rows) else "KILLED"
        status = "FAILED" if counts["failed"] else status
    now = max(times, default=0)
    progress = {
        "progress": 100 * done / max(asked, 1),
        "points_finished": counts["finished"],
        "points_failed": counts["failed"],
    }
    text = note or sweep.about
    return Run(
        kind="sweep",
        key=sweep.name,
        name=f"sweep {sweep.name}",
        status=status,
        started=min(times, default=0),
        ended=now,
        metrics=tuple((k, float(v), done, now) for k, v in progress.items()) if times else (),
        params={},
        tags={
            "quest.model": _listed(row.model for row in rows),
            "quest.task": _listed(row.task for row in rows),
            "quest.method": _listed(row.method for row in rows),
            "quest.data": _listed(row.data for row in rows),
            **({"quest.device": sweep.device} if sweep.device else {}),
            **({"mlflow.note.content": text[:8000]} if text else {}),
        },
    )


def _dots(row: Row, rows: Iterable[Row]) -> list[tuple[str, float, int, int]]:
    budgets: list[int | None] = [row.budget]
    if row.budget is None:
        beside = [r for r in rows if r.setting == row.setting and r.task == row.task]
        budgets = list(dict.fromkeys(r.budget for r in beside if r.budget is not None)) or [0]
    found = {
        "score": row.score,
        "score_high": row.high,
        "score_low": row.low,
        "tokens_attended": row.attended,
        "tokens_read": row.read,
        "versus_full": row.delta,
    }
    known = {name: value for name, value in found.items() if not math.isnan(value)}
    at = _ms(row.finished_at)
    return [(f"{k}/{row.task}", v, b or 0, at) for b in budgets for k, v in known.items()]


def _shared(row: Row) -> dict[str, str]:
    return {
        "quest.model": row.model,
        "quest.method": row.method,
        "quest.data": row.data,
        "quest.protocol": row.protocol,
    }


def _params(row: Row, identity: Mapping[str, Any]) -> dict[str, str]:
    """The short list a person sorts by, then the settings of protocol, method and model."""
    params: dict[str, Any] = {
        "model": row.model,
        "task": row.task,
        "method": row.method,
        "budget": "all" if row.budget is None else row.budget,
        "page_size": row.page_size,
        "dense_layers": row.dense_layers,
        "seed": row.seed,
        "data": row.data,
        "protocol": row.protocol,
    }
    for group in SETTINGS:
        for key, value in identity.get(group, {}).items():
            if key not in ("name", "_target_") and isinstance(value, str | int | float | list):
                params[f"{group}.{key}"] = value
    return {key: str(value)[:LONGEST_TEXT] for key, value in list(params.items())[:30]}


def _datasets(
    rows: Iterable[Row], identity: Callable[[str], Mapping[str, Any] | None]
) -> tuple[Dataset, ...]:
    found: dict[str, Dataset] = {}
    for row in rows:
        if row.task not in found:
            known = identity(row.point) or {}
            read = known.get("data", {"name": row.data})
            digest = plan.digest([read, known.get("task", {}), row.seed])
            found[row.task] = Dataset(f"{row.task} ({row.data})"[:500], digest, row.data)
    return tuple(found.values())


def _details(records: Sequence[Record]) -> dict[str, float]:
    """Means of what a task measured beside its score."""
    values: dict[str, list[float]] = {}
    for record in records:
        for key, value in (record.get("metrics") or {}).items():
            values.setdefault(f"detail/{key}", []).append(float(value))
    return {key: math.fsum(found) / len(found) for key, found in sorted(values.items())}


def _samples(records: Sequence[Record]) -> dict[str, Any]:
    """The table of samples, in the form that MLflow's evaluation view reads."""
    columns = [*OUTCOME, *COST, *(["error"] if any(r["error"] for r in records) else [])]
    return {"columns": columns, "data": [[r[column] for column in columns] for r in records]}


def _said(row: Row) -> str:
    if not row.n:
        return f"failed: {row.error}"
    text = f"{row.metric} {row.score:.2f}"
    if not math.isnan(row.low):
        text += f" [{row.low:.2f}, {row.high:.2f}]"
    text += f", n = {row.n}"
    if row.n < row.n_expected:
        text += f" of {row.n_expected}"
    if row.budget is not None and not math.isnan(row.delta):
        text += f"; {row.delta:+.2f} against full on the same {row.pairs} samples"
    return text + (f"; failed: {row.error}" if row.error else "")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(names))[:4000]


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
