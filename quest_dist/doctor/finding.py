"""A finding: one fact of this machine, how it stands, and what to do about it.

`ok`: as it should be. `warning`: a sweep runs, but not all that it could do. `problem`: a sweep
started like this would fail.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

OK, WARNING, PROBLEM = "ok", "warning", "problem"


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at (`check`), `status`, `fact`, and `advice` where not ok."""

    check: str
    status: str
    fact: str
    advice: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Asked:
    """What is to be looked at: where results go, and whether a private Ray may be started.

    `tracking_uri`: MLflow's store; empty: MLFLOW_TRACKING_URI, or a database in `output_dir`.
    """

    output_dir: Path
    tracking_uri: str = ""
    start_ray: bool = False

    @property
    def uri(self) -> str:
        """The store that a sweep with this output_dir would write to."""
        own = f"sqlite:///{self.output_dir.absolute()}/mlflow.db"
        return self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or own


def ok(check: str, fact: str) -> Finding:
    """Something as it should be."""
    return Finding(check, OK, fact)


def warning(check: str, fact: str, advice: str) -> Finding:
    """Something that takes a part of what could be done."""
    return Finding(check, WARNING, fact, advice)


def problem(check: str, fact: str, advice: str) -> Finding:
    """Something that a sweep would fail on."""
    return Finding(check, PROBLEM, fact, advice)


def gib(size: int) -> str:
    """Bytes as people read them."""
    return f"{size / 2**30:.1f} GiB"


def refusal(folder: Path) -> str:
    """Why no file can be made in a folder; empty where one can."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return f"{folder} cannot be written ({error.strerror or error})"


def nearest(path: Path) -> Path:
    """The nearest folder above or at `path` that exists."""
    path = path.expanduser().absolute()
    return next(place for place in (path, *path.parents) if place.is_dir())
