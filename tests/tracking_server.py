"""A real `mlflow server` on loopback, and a real PostgreSQL for it."""

from __future__ import annotations

import contextlib
import getpass
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

START_SECONDS = 120.0
LIGHT = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}


class Server:
    """An MLflow server on one port of loopback, over a store that outlives it."""

    def __init__(self, folder: Path, store: str) -> None:
        self.folder, self.store, self.port = folder, store, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, unless it runs, and wait until it answers."""
        if self._process is not None and self._process.poll() is None:
            return
        arguments = {
            "backend-store-uri": self.store,
            "artifacts-destination": str(self.folder / "artifacts"),
            "host": "127.0.0.1",
            "port": str(self.port),
            "workers": "1",
        }
        command = [sys.executable, "-m", "mlflow", "server"]
        command += [part for key, value in arguments.items() for part in (f"--{key}", value)]
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                env=os.environ | LIGHT,
                cwd=self.folder,
                stdout=log,
                stderr=log,
                start_new_session=True,  # so that its workers die with it
            )
        ends = time.monotonic() + START_SECONDS
        while not self._answers():
            late = time.monotonic() > ends or self._process.poll() is not None
            assert not late, (self.folder / "server.log").read_text()[-3000:]
            time.sleep(0.1)

    def kill(self) -> None:
        """SIGKILL, to all of its processes."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health") as answer:
            return bool(answer.status == 200)
        return False


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextlib.contextmanager
def silent() -> Iterator[str]:
    """The address of a server that takes connections and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(64)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@contextlib.contextmanager
def refusing() -> Iterator[tuple[str, list[Any]]]:
    """The address of a server that lets nobody in, and the headers of each request to it."""
    headers: list[Any] = []

    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            headers.append(self.headers)
            self.send_error(401)

        def log_message(self, *said: Any) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", headers
        server.shutdown()


def lacking_for_postgres() -> str:
    """What this machine lacks to run PostgreSQL under MLflow; empty if nothing."""
    if importlib.util.find_spec("psycopg2") is None:
        return "psycopg2 is not installed (pip install 'quest_dist[postgres]')"
    return "" if _program("initdb") else "PostgreSQL is not installed (apt-get install postgresql)"


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """A fresh PostgreSQL on a socket in a folder of its own; yields MLflow's address of it.

    It refuses to run as root, which then lends it the account `nobody`.
    """
    root = os.geteuid() == 0
    user = "nobody" if root else getpass.getuser()
    folder = Path(tempfile.mkdtemp(prefix="pg"))  # sockets have short paths
    try:
        if root:
            shutil.chown(folder, user)
        account = {"user": user} if root else {}

        def call(program: str, *arguments: str) -> None:
            subprocess.run(
                [_program(program), "-D", str(folder / "data"), *arguments],
                check=True,
                cwd=folder,
                stdout=subprocess.DEVNULL,
                **account,  # type: ignore[call-overload]
            )

        call("initdb", "-U", "quest", "--auth=trust", "--no-sync")
        options = f"-c listen_addresses='' -k {folder} -c fsync=off"
        call("pg_ctl", "-w", "-l", str(folder / "log"), "-o", options, "start")
        try:
            yield f"postgresql+psycopg2://quest@/postgres?host={folder}"
        finally:
            call("pg_ctl", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _program(name: str) -> str:
    """The newest of PostgreSQL's programs of a name; Debian keeps them out of PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return str(found[-1]) if found else shutil.which(name) or ""
