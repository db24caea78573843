"""The ledger: one SQLite file of an output directory that holds every result (the truth).

Invariants:
* One record per (point, sample), written once and never changed: insert or ignore. What MLflow
  and the figures show can be rebuilt from here.
* A failure is kept apart from the records, does not count as done, and is forgotten when the
  sample succeeds; so a second launch retries it.
* A batch that `add` returned from is on disk (one transaction, synchronous=FULL).
* Only the driver of a sweep writes; `lock` keeps a second driver out of the same directory.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from quest_dist.plan import Point, canonical

_SCHEMA = """
create table if not exists point(key text primary key, identity text not null);
create table if not exists record(
  point text not null, sample integer not null, finished_at real not null, body text not null,
  primary key (point, sample)) without rowid;
create table if not exists failure(
  point text not null, sample integer not null, finished_at real not null, body text not null,
  primary key (point, sample)) without rowid;
"""
#: Every record carries these; `check_record` names what is missing.
FIELDS = (
    "point",
    "sample",
    "score",
    "prediction",
    "reference",
    "attended",
    "planned",
    "read",
    "context_tokens",
    "tail_tokens",
    "new_tokens",
    "truncated",
    "seconds",
    "prefill_seconds",
    "finished_at",
    "error",
    "metric",
    "metrics",
    "details",
)


class Ledger:
    """Records by (point, sample). One instance may be used from several threads."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.RLock()
        self._versions: Counter[str] = Counter()
        self._db = sqlite3.connect(self.path, timeout=30, check_same_thread=False)
        self._db.execute("pragma synchronous=full")
        with self._transaction() as db:
            for statement in _SCHEMA.split(";"):
                db.execute(statement)

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    def add_points(self, points: Iterable[Point]) -> None:
        """Note what the keys mean, so that any number can be followed back to its settings."""
        with self._transaction() as db:
            db.executemany(
                "insert or ignore into point values (?, ?)",
                [(point.key, canonical(point.identity)) for point in points],
            )

    def add(self, records: Iterable[Mapping[str, Any]]) -> int:
        """Store records; return how many were new results.

        A record whose (point, sample) is already finished is ignored. One with an `error` goes
        to the failures, unless the sample is finished.
        """
        good: list[tuple[Any, ...]] = []
        bad: list[tuple[Any, ...]] = []
        for record in records:
            check_record(record)
            row = (record["point"], record["sample"], record["finished_at"], json.dumps(record))
            (bad if record["error"] is not None else good).append(row)
        with self._transaction() as db:
            before = db.total_changes
            db.executemany("insert or ignore into record values (?, ?, ?, ?)", good)
            added = db.total_changes - before
            keys = [row[:2] for row in good]
            db.executemany("delete from failure where point = ? and sample = ?", keys)
            db.executemany(
                "insert or replace into failure select ?1, ?2, ?3, ?4 where not exists"
                " (select 1 from record where point = ?1 and sample = ?2)",
                bad,
            )
        with self._lock:
            self._versions.update({row[0] for row in (*good, *bad)})
        return added

    def version(self, point: str) -> int:
        """Return a number that grows whenever this instance adds records of a point."""
        return self._versions[point]

    def records(self, point: str) -> list[dict[str, Any]]:
        """Return the records of a point by sample: finished, or failed and not yet made good."""
        found = self._bodies("record", point) + self._bodies("failure", point)
        return sorted(found, key=lambda record: int(record["sample"]))

    def failures(self, point: str) -> list[dict[str, Any]]:
        """Return the records with an `error` of samples that have not succeeded, by sample."""
        return self._bodies("failure", point)

    def done(self, point: str) -> set[int]:
        """Return the finished samples of a point."""
        return {row[0] for row in self._read("select sample from record where point = ?", point)}

    def complete(self, points: Iterable[Point], counts: Mapping[str, int]) -> bool:
        """Whether every point has all its samples (`counts`: point key -> number of samples)."""
        return all(set(range(counts[p.key])) <= self.done(p.key) for p in points)

    def identity(self, point: str) -> dict[str, Any] | None:
        """Return what a key stands for, None when the ledger never saw it."""
        rows = self._read("select identity from point where key = ?", point)
        return json.loads(rows[0][0]) if rows else None

    def pace(self, model: str, task: str) -> tuple[float, float] | None:
        """Return the measured mean (prefill, decode of one row) seconds a sample, None if none."""
        rows = self._read(
            "select avg(json_extract(body, '$.prefill_seconds')),"
            " avg(json_extract(body, '$.seconds')) from record where point in"
            " (select key from point where json_extract(identity, '$.model.name') = ?"
            " and json_extract(identity, '$.task.name') = ?)",
            model,
            task,
        )
        prefill, decode = rows[0]
        return None if prefill is None else (float(prefill), float(decode or 0.0))

    def _bodies(self, table: str, point: str) -> list[dict[str, Any]]:
        rows = self._read(f"select body from {table} where point = ? order by sample", point)
        return [json.loads(row[0]) for row in rows]

    def _read(self, sql: str, *values: Any) -> Sequence[tuple[Any, ...]]:
        with self._lock:
            return self._db.execute(sql, values).fetchall()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._db:
            yield self._db


def check_record(record: Mapping[str, Any]) -> None:
    """Raise ValueError unless a record has every field, no other, and a score or an error."""
    missing = [name for name in FIELDS if name not in record]
    extra = sorted(set(record) - set(FIELDS))
    if missing or extra:
        raise ValueError(f"record: missing fields {missing}, unknown fields {extra}")
    if (record["score"] is None) == (record["error"] is None):
        raise ValueError("record: exactly one of score and error must be set")


@contextlib.contextmanager
def lock(directory: str | Path) -> Iterator[None]:
    """Hold an output directory for this process; a crash releases it.

    Raises ValueError that names the process which holds it.
    """
    path = Path(directory) / ".lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise ValueError(
                f"output_dir={directory}: another sweep is writing here (process {holder});"
                " wait for it, or choose another output_dir"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
