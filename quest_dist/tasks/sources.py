"""Source: where a task's records come from, and what one record must hold.

A record has the fields of LongBench's JSONL, of which `context`, `input` and `answers` are read.
Three sources exist: `generated` (made from a seed), `files` (a folder) and `hub` (a dataset
repository). A source is checked in the driver, before any worker starts, by asking for `identity`
and `count`; the identity digests content and never names a path: a moved folder keeps its results.
"""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Record = Mapping[str, Any]
Measure = Callable[[Record], int]
"""Counts the tokens of the whole prompt that a task would make of a record."""


@dataclass(frozen=True)
class Form:
    """How a task's records are put before a model, and for how long it may answer."""

    template: str
    """Text with {context} and {input}."""
    marker: str
    """Text at whose last occurrence the released code starts the tail, in the whole prompt."""
    question: str
    """Text at whose last occurrence outside the context the question begins."""
    max_new_tokens: int
    chat: bool = True
    """False for few-shot tasks, whose examples already show the format."""
    after: str = ""
    """Where an answer contains this, what follows it is scored: the last step of a chain."""
    ends: tuple[str, ...] = ()
    """Texts at whose first occurrence an answer ends before it is scored."""

    def answer(self, text: str) -> str:
        """Return the part of a generated text that is scored."""
        if self.after and self.after in text:
            text = text.partition(self.after)[2]
        if self.ends:
            # LongBench drops leading line ends before it takes the first line.
            text = text.lstrip("\n")
        for end in self.ends:
            text = text.partition(end)[0]
        return text


class Source(Protocol):
    """Records by task name and index."""

    @property
    def tokens(self) -> int | None:
        """Return the tokens of every prompt that is made; None where records come as they are."""
        ...

    def identity(self, task: str) -> dict[str, Any]:
        """Return what makes this task's records what they are; goes into every point's key."""
        ...

    def count(self, task: str) -> int | None:
        """Return how many records there are; None for a source that never ends."""
        ...

    def record(self, task: str, index: int, seed: int, measure: Measure) -> Record:
        """Return record `index`; `seed` and `measure` matter only where records are made."""
        ...

    def form(self, task: str) -> Form | None:
        """Return the source's own form for this task; None for the benchmark's official one."""
        ...

    def books(self) -> list[tuple[str, str]]:
        """Return (title, text) of every book, for perplexity, in a fixed order."""
        ...


class Stored(ABC):
    """What sources share whose records lie somewhere, in the benchmark's own form."""

    tokens: int | None = None

    def count(self, task: str) -> int:
        """Return the number of the task's records."""
        return len(self._records(task))

    def record(self, task: str, index: int, seed: int, measure: Measure) -> Record:
        """Return record `index` of the task."""
        return self._records(task)[index]

    def form(self, task: str) -> Form | None:
        """Return None: the official form."""
        return None

    @abstractmethod
    def _records(self, task: str) -> Sequence[Record]: ...


def safe_name(task: str) -> str:
    """Return `task`, refusing a name that could leave its folder."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.\-]*", task):
        raise ValueError(f"task dataset={task!r} is not a plain file name (letters, digits, _ . -)")
    return task


def digest(parts: Iterable[bytes]) -> str:
    """Return the first 16 hex digits of the SHA-256 of `parts`, each prefixed with its length."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(len(part).to_bytes(8, "little"))
        sha.update(part)
    return sha.hexdigest()[:16]


def parse_lines(data: bytes, where: str) -> list[tuple[str, object]]:
    """Parse JSON lines into (place, value); ValueError names the place `where` and the line."""
    values: list[tuple[str, object]] = []
    # Split at line feeds alone: other line separators may stand unescaped inside a JSON text.
    for number, line in enumerate(data.split(b"\n"), 1):
        place = f"{where}, line {number}"
        if not line.strip():
            continue
        try:
            values.append((place, json.loads(line)))
        except ValueError as error:  # also UnicodeDecodeError
            raise ValueError(f"{place}: not JSON ({error})") from None
        except RecursionError:
            raise ValueError(f"{place}: not JSON that can be read (nested too deep)") from None
    if not values:
        raise ValueError(f"{where}: no records")
    return values


def checked(record: object, where: str) -> Record:
    """Return `record` if it has what every task reads; ValueError says what is wrong, and where."""
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: not a JSON object but {type(record).__name__}")
    for key in ("context", "input"):
        if not isinstance(record.get(key), str):
            raise ValueError(f"{where}: field {key!r} is missing or not text")
    answers = record.get("answers")
    if not (isinstance(answers, list) and answers and all(isinstance(a, str) for a in answers)):
        raise ValueError(f"{where}: field 'answers' is missing or not a list of at least one text")
    if not record["context"]:
        raise ValueError(f"{where}: field 'context' is empty")
    for text in (record["context"], record["input"], *answers):
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can name halves of a character
            raise ValueError(
                f"{where}: text with {text[error.start]!r}, which is no character"
            ) from None
    return record
