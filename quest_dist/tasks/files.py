"""Files: records out of a folder of <task>.jsonl, and books out of a folder of .txt."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from quest_dist.tasks.sources import Record, Stored, checked, digest, parse_lines, safe_name


class Files(Stored):
    """A folder in LongBench's own layout: `<root>/<task>.jsonl`, one JSON record a line.

    Books are the `.txt` files of `books`, or else of `<root>/pg19` or of `<root>` itself.
    """

    def __init__(self, root: str, books: str | None = None) -> None:
        """Name the folder; ValueError where there is none."""
        if not root:
            raise ValueError("data.root is empty; name the folder that holds <task>.jsonl")
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            raise ValueError(f"data.root={root!r} is not a folder")
        self._books = Path(books).expanduser() if books else None

    def identity(self, task: str) -> dict[str, Any]:
        """Return the digest of the task's file, or of all books for `pg19`."""
        if task == "pg19":
            parts = [part.encode() for book in self.books() for part in book]
            return {"source": "files", "digest": digest(parts)}
        return {"source": "files", "digest": digest([self._bytes(task)])}

    @functools.cache  # noqa: B019 - one source lives as long as its unit
    def books(self) -> list[tuple[str, str]]:
        """Return (file name, text) of every book, by name."""
        folder = self._books or next(
            (place for place in (self.root / "pg19", self.root) if any(place.glob("*.txt"))), None
        )
        paths = sorted(folder.glob("*.txt")) if folder else []
        if not paths:
            place = self._books or self.root / "pg19"
            raise ValueError(f"no .txt books in {place} (set data.books to their folder)")
        return [(path.stem, _text(path)) for path in paths]

    def _bytes(self, task: str) -> bytes:
        path = self.root / f"{safe_name(task)}.jsonl"
        if not path.is_file():
            there = ", ".join(sorted(file.stem for file in self.root.glob("*.jsonl"))) or "none"
            raise ValueError(f"no file {path}; tasks present: {there}")
        return path.read_bytes()

    @functools.cache  # noqa: B019
    def _records(self, task: str) -> list[Record]:
        lines = parse_lines(self._bytes(task), f"{self.root / task}.jsonl")
        return [checked(value, place) for place, value in lines]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"book {path} is not UTF-8 ({error.reason} at {error.start})") from None
