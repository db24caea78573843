"""What a sweep talks to: Ray, MLflow's store and the hub. A secret is never part of a finding."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import socket
import sqlite3
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

from quest_dist import redact
from quest_dist.cluster import Cluster
from quest_dist.doctor.finding import Asked, Finding, nearest, ok, problem, refusal, warning

SECONDS = 3.0  # that a server may take to answer
HUB = "https://huggingface.co"
PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
#: What SQLAlchemy imports for a scheme.
DRIVERS = {"postgresql": "psycopg", "mysql": "MySQLdb", "mssql": "pyodbc"}


def ray(asked: Asked) -> Iterator[Finding]:
    """Whether Ray imports; whether a cluster that is named answers; a private one, if asked."""
    without = "cluster=inline runs without Ray"
    if importlib.util.find_spec("ray") is None:
        yield problem("ray", "not installed", f"pip install 'ray[tune]'; {without}")
        return
    from quest_dist import schedule_ray  # sets Ray's own variables before it imports it

    fact = f"{importlib.metadata.version('ray')} imports"
    address = os.environ.get("RAY_ADDRESS", "")
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        if refused := _unreachable(host.strip("[]"), int(port)):
            advice = "start that cluster, or unset RAY_ADDRESS for a private one"
            yield problem("ray", f"{fact}, but RAY_ADDRESS={address}: {refused}", advice)
            return
        fact += f"; RAY_ADDRESS={address} answers"
    if asked.start_ray:
        with tempfile.TemporaryDirectory() as storage:
            private = schedule_ray.Tuned(Cluster(), Path(storage) / "ray", "", 1)
            try:
                with private:
                    fact += "; a private cluster started, on loopback, and stopped"
            except Exception as error:
                said = redact.text(" ".join(str(error).split()))[:300]
                fact += f", but a private cluster does not start ({type(error).__name__}: {said})"
                yield problem("ray", fact, f"look into /tmp/ray/session_latest/logs; {without}")
                return
    yield ok("ray", fact)


def mlflow(asked: Asked) -> Iterator[Finding]:
    """Whether MLflow is there and its store can be written to, or answers."""
    without = "tracking=none runs without MLflow"
    try:
        version = importlib.metadata.version("mlflow")
    except importlib.metadata.PackageNotFoundError:
        yield problem("mlflow", "not installed", f"pip install mlflow; {without}")
        return
    uri = asked.uri
    fact = f"{version}, store {redact.text(uri)}"
    kind = urlsplit(uri).scheme.partition("+")[0]
    advice = "a sweep would run, and the same command show it later: start or mend the store"
    if kind in ("http", "https"):
        wrong = _unanswered(f"{uri.rstrip('/')}/health")
    elif kind == "sqlite":
        wrong = _unwritable(unquote(urlsplit(uri).path[1:]))
    elif kind in PORTS:
        parts = urlsplit(uri)
        wrong = _driverless(parts.scheme)
        wrong = wrong or _unreachable(parts.hostname or "localhost", parts.port or PORTS[kind])
    else:
        wrong = f"the scheme {kind!r} is none of those looked at: sqlite, http(s), a database"
        advice = "a sweep refuses it, unless a plugin of MLflow's brings it"
    if wrong:
        yield warning("mlflow", f"{fact}: {wrong}", f"{advice}; {without}")
    else:
        yield ok("mlflow", f"{fact} {'can be written' if kind == 'sqlite' else 'answers'}")


def hub(asked: Asked) -> Iterator[Finding]:
    """Whether the hub answers, and whether there is a token for gated models."""
    endpoint = (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    token = any(os.environ.get(name) for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"))
    token = token or (home / "token").is_file()
    fact = "a token is set" if token else "no token (only gated models need one)"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        yield ok("hub", f"offline by HF_HUB_OFFLINE: only what is cached; {fact}")
        return
    shown = redact.text(endpoint)
    if refused := _unanswered(endpoint):
        advice = "the default model and data need none; set HF_ENDPOINT to a mirror to use others"
        yield warning("hub", f"{shown}: {refused}; {fact}", advice)
    else:
        yield ok("hub", f"{shown} answers; {fact}")


def _driverless(scheme: str) -> str:
    """Which package a database's scheme needs and is not there; empty where it is."""
    kind, _, named = scheme.partition("+")
    module = named or DRIVERS[kind]
    if importlib.util.find_spec(module) is not None:
        return ""
    return f"{scheme}:// needs the Python package {module}, which is not installed"


def _unreachable(host: str, port: int) -> str:
    """Why nothing takes connections there; empty where something does."""
    try:
        with socket.create_connection((host, port), timeout=SECONDS):
            return ""
    except (OSError, ValueError) as error:
        return f"nothing answers at {host}:{port} ({error})"


def _unanswered(url: str) -> str:
    """Why a server gave no answer; empty where it gave any. It is not told who asks."""
    parts = urlsplit(url)
    asked = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    try:
        with urllib.request.urlopen(asked, timeout=SECONDS):
            return ""
    except urllib.error.HTTPError as error:
        return "" if error.code < 500 else f"it answers with status {error.code}"
    except (OSError, ValueError) as error:  # a URLError is an OSError
        return redact.text(f"no answer ({getattr(error, 'reason', error)})")


def _unwritable(path: str) -> str:
    """Why a SQLite database cannot be written; empty where it can. It is left as it is."""
    if not path or path == ":memory:":
        return "a database in memory is gone with its process"
    file = Path(path)
    if not file.exists():
        return refusal(nearest(file.parent))
    try:
        with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=rw", uri=True)) as db:
            db.execute("pragma busy_timeout = 1000")
            db.execute("begin immediate")
            db.execute("select count(*) from sqlite_master").fetchone()
            db.execute("rollback")
    except sqlite3.Error as error:
        return str(error)
    return "" if os.access(file, os.W_OK) else "read only"
