"""The ledger: one SQLite file of an output directory that holds every result (the truth).

Invariants:
* One record per (point, sample), written once and never changed: insert or ignore. What MLflow
  and the figures show can be rebuilt from here.
* A failure is kept apart from the records, does not count as done, and is forgotten when the
  sample succeeds; so a second launch retries it.
* A batch that `add` returned from is on disk (one transaction, synchronous=FULL).
* `ran` says of each report when and where it was made; it is only added to, and nothing else is
  computed from it.
* Only the driver of a sweep writes; `lock` keeps a second driver out of the same directory.
* A disk that takes no more is an OSError, a damaged file a ValueError, both naming the file; what
  was there stays as it was.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import socket
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from quest_dist.plan import Point, canonical

_SCHEMA = """
create table if not exists point(key text primary key, identity text not null);
create table if not exists record(
  point text not null, sample integer not null, finished_at real not null, body text not null,
  primary key (point, sample)) without rowid;
create table if not exists failure(
  point text not null, sample integer not null, finished_at real not null, body text not null,
  primary key (point, sample)) without rowid;
create table if not exists ran(
  unit text not null, sample integer not null, alone integer not null, host text not null,
  device text not null, process integer not null, started real not null, ended real not null);
"""
_HEADER = b"SQLite format 3\0"
#: What SQLite says of a disk, as the system says it; and of a file that is no ledger any more.
_DISK = {
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_IOERR: errno.EIO,
    sqlite3.SQLITE_READONLY: errno.EROFS,
}
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
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


#: What the ledger itself looks at.
_KINDS: Mapping[str, type | tuple[type, ...]] = {
    "point": str,
    "sample": int,
    "finished_at": (int, float),
}
_NAMES = {"point": "text", "sample": "a whole number", "finished_at": "a number"}


class Ran(NamedTuple):
    """When and where one sample of a unit ran: unix seconds by its host's clock, from the moment
    that its worker was free for it (a unit's first sample holds the loading of the model).

    `alone`: a time, beside which nothing else may run. `device`: cpu, or the GPUs by number.
    """

    unit: str
    sample: int
    alone: bool
    host: str
    device: str
    process: int
    started: float
    ended: float


class Ledger:
    """Records by (point, sample). One instance may be used from several threads."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.RLock()
        _check_header(self.path)
        self._versions: Counter[str] = Counter()
        self._db = sqlite3.connect(self.path, timeout=30, check_same_thread=False)
        try:
            with self._transaction() as db:
                db.execute("pragma synchronous=full")
                for statement in _SCHEMA.split(";"):
                    db.execute(statement)
                ((size,),) = db.execute("pragma page_size")
            if self.path.stat().st_size % size:  # SQLite reads what is cut off a page as zeros
                raise self._damaged("its last page is cut")
        except BaseException:
            self._db.close()
            raise

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

    def add(self, records: Iterable[Mapping[str, Any]], ran: Ran | None = None) -> int:
        """Store records, and when and where they were made; return how many were new results.

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
            if db.execute("select exists (select 1 from failure)").fetchone()[0]:
                keys = [row[:2] for row in good]
                db.executemany("delete from failure where point = ? and sample = ?", keys)
            db.executemany(
                "insert or replace into failure select ?1, ?2, ?3, ?4 where not exists"
                " (select 1 from record where point = ?1 and sample = ?2)",
                bad,
            )
            if ran is not None:
                db.execute("insert into ran values (?, ?, ?, ?, ?, ?, ?, ?)", ran)
        with self._lock:
            self._versions.update({row[0] for row in (*good, *bad)})
        return added

    def ran(self) -> list[Ran]:
        """Return when and where every sample ran that was reported, in the order of starting."""
        found = self._read("select * from ran order by started")
        return [Ran(unit, sample, bool(alone), *rest) for unit, sample, alone, *rest in found]

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
            " avg(json_extract(body, '$.seconds')) from record where json_valid(body) and point in"
            " (select key from point where json_extract(identity, '$.model.name') = ?"
            " and json_extract(identity, '$.task.name') = ?)",
            model,
            task,
        )
        prefill, decode = rows[0]
        return None if prefill is None else (float(prefill), float(decode or 0.0))

    def _bodies(self, table: str, point: str) -> list[dict[str, Any]]:
        rows = self._read(f"select body from {table} where point = ? order by sample", point)
        try:
            return [json.loads(row[0]) for row in rows]
        except ValueError as error:
            raise self._damaged(f"{table} of {point}: {error}") from error

    def _read(self, sql: str, *values: Any) -> Sequence[tuple[Any, ...]]:
        with self._lock, self._explained():
            return self._db.execute(sql, values).fetchall()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._explained(), self._db:
            yield self._db

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Raise what SQLite says of the disk and the file as what it is."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            if code in _DISK:
                raise OSError(_DISK[code], str(error), str(self.path)) from error
            if code in _DAMAGED:
                raise self._damaged(str(error)) from error
            raise

    def _damaged(self, found: str) -> ValueError:
        return ValueError(
            f"{self.path} is damaged ({found}): put a copy of it back, or move it away and every"
            " record is computed again"
        )


def _check_header(path: Path) -> None:
    """Raise ValueError for a file of something else: SQLite overwrites one that is short."""
    journal = path.with_name(f"{path.name}-journal")  # of a first page that was being written
    if path.is_file() and not journal.exists():
        with path.open("rb") as file:
            start = file.read(len(_HEADER))
        if start and start != _HEADER:
            raise ValueError(f"{path} is no ledger; move it away, or choose another output_dir")


def check_record(record: Mapping[str, Any]) -> None:
    """Raise ValueError unless a record has every field, no other, and a score or an error."""
    missing = [name for name in FIELDS if name not in record]
    extra = sorted(set(record) - set(FIELDS))
    if missing or extra:
        raise ValueError(f"record: missing fields {missing}, unknown fields {extra}")
    if (record["score"] is None) == (record["error"] is None):
        raise ValueError("record: exactly one of score and error must be set")
    for name, kinds in _KINDS.items():
        value = record[name]
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise ValueError(f"record: {name}={value!r} is not {_NAMES[name]}")
    if record["sample"] < 0 or not math.isfinite(record["finished_at"]):
        raise ValueError("record: sample is negative, or finished_at is no time")


@contextlib.contextmanager
def lock(directory: str | Path) -> Iterator[None]:
    """Hold an output directory for this process; a crash releases it.

    Raises ValueError that names the process which holds it, or says why it cannot be written.
    """
    path = Path(directory) / ".lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except (FileExistsError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
        raise ValueError(
            f"output_dir={directory}: no folder that can be written ({error.strerror}:"
            f" {error.filename})"
        ) from error
    with file:
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
        file.write(f"{os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
