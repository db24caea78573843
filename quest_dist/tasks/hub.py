"""Hub: records and books out of Hugging Face dataset repositories, read as plain files.

Files are downloaded by `huggingface_hub` into its own cache and read here: a `.zip` of JSONL (as
LongBench ships), a `.jsonl`, or `.parquet`. No loading script of a repository is run. The client's
environment holds: HF_ENDPOINT, HF_HUB_OFFLINE, HF_HOME, HF_TOKEN.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import zipfile
from pathlib import Path
from typing import Any

from quest_dist.suggest import did_you_mean
from quest_dist.tasks.sources import (
    Record,
    Stored,
    checked,
    digest,
    parse_lines,
    safe_name,
)

LARGEST = 1 << 31
"""Bytes above which a member of an archive is refused: no task is near it, a zip bomb is."""


class Hub(Stored):
    """LongBench's layout in `repo`, and books in `books_repo`.

    `file` and `books_file` may hold {task} and *; `member` names the file inside a zip.
    """

    def __init__(
        self,
        repo: str = "THUDM/LongBench",
        revision: str = "main",
        file: str = "data.zip",
        member: str = "data/{task}.jsonl",
        books_repo: str = "emozilla/pg19-test",
        books_revision: str = "main",
        books_file: str = "data/*.parquet",
    ) -> None:
        """Check the settings; nothing is downloaded before it is asked for."""
        for key, value in (("repo", repo), ("books_repo", books_repo)):
            if value.count("/") != 1 or not all(value.split("/")):
                raise ValueError(f"data.{key}={value!r} is not owner/name")
        for key, value in (("file", file), ("books_file", books_file)):
            if not value.endswith((".zip", ".jsonl", ".parquet")):
                raise ValueError(f"data.{key}={value!r} is not a .zip, .jsonl or .parquet file")
            if value.startswith(("/", "~")) or ".." in value.split("/"):
                raise ValueError(f"data.{key}={value!r} is no path inside the repository")
        self.repo, self.revision, self.file, self.member = repo, revision, file, member
        self.books_repo, self.books_revision = books_repo, books_revision
        self.books_file = books_file

    def identity(self, task: str) -> dict[str, Any]:
        """Return the repository and the digest of what was read; a moved branch shows in it."""
        if task == "pg19":
            parts = [part.encode() for book in self.books() for part in book]
            return {"source": "hub", "repo": self.books_repo, "digest": digest(parts)}
        parts = [json.dumps(dict(r), sort_keys=True).encode() for r in self._records(task)]
        return {"source": "hub", "repo": self.repo, "digest": digest(parts)}

    @functools.cache  # noqa: B019 - one source lives as long as its unit
    def books(self) -> list[tuple[str, str]]:
        """Return (title, text) of every book, in the order of the files and their rows."""
        found = []
        for path in _download(self.books_repo, self.books_revision, self.books_file):
            for place, row in _rows(path, ""):
                if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                    raise ValueError(f"{self.books_repo}, {place}: no field 'text'")
                found.append((str(row.get("short_book_title") or place), row["text"]))
        return found

    @functools.cache  # noqa: B019
    def _records(self, task: str) -> list[Record]:
        name = safe_name(task)
        member = self.member.replace("{task}", name)
        records: list[Record] = []
        for path in _download(self.repo, self.revision, self.file.replace("{task}", name)):
            records += [checked(row, f"{self.repo}, {place}") for place, row in _rows(path, member)]
        return records


def _rows(path: Path, member: str) -> list[tuple[str, object]]:
    """Return (place, row) of a downloaded file; `member` is read out of a zip."""
    if path.suffix == ".parquet":
        try:
            parquet = importlib.import_module("pyarrow.parquet")
        except ImportError:
            raise ValueError(f"reading {path.name} needs pyarrow: pip install pyarrow") from None
        rows = parquet.read_table(path).to_pylist()
        return [(f"{path.name}, row {number}", row) for number, row in enumerate(rows, 1)]
    if path.suffix == ".zip":
        return parse_lines(_member(path, member), f"{path.name}:{member}")
    return parse_lines(path.read_bytes(), path.name)


def _member(path: Path, member: str) -> bytes:
    """Read one member into memory: nothing is unpacked, so no name inside can lead anywhere."""
    try:
        with zipfile.ZipFile(path) as archive:
            if member not in archive.namelist():
                there = [n for n in archive.namelist() if n.endswith(".jsonl")]
                raise ValueError(f"{path.name} has no {member!r}; {did_you_mean(member, there)}")
            if archive.getinfo(member).file_size > LARGEST:
                raise ValueError(f"{path.name}:{member} unpacks to more than {LARGEST} bytes")
            return archive.read(member)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path.name} is not a zip archive ({error})") from None


def _download(repo: str, revision: str, pattern: str) -> list[Path]:
    """Return the local paths of a repository's files that match, downloading what is missing."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    # The client reads this once, when it is first imported; a later change should count as well.
    endpoint = os.environ.get("HF_ENDPOINT") or None
    where = f"dataset {repo} at {revision}"
    try:
        folder = huggingface_hub.snapshot_download(
            repo,
            repo_type="dataset",
            revision=revision,
            allow_patterns=[pattern],
            endpoint=endpoint,
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{where}: cannot be read ({reason[:300]})") from error
    # An offline client answers with what an earlier download left, which may lack these files.
    paths = sorted(Path(folder).glob(pattern))
    if not paths:
        raise ValueError(f"{where} has no file {pattern!r}")
    return paths
