"""A dataset hub on this machine: the few answers of the real one that a download asks for."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def hub_server(repos: Mapping[str, Mapping[str, bytes]]) -> Iterator[tuple[str, list[str]]]:
    """Serve datasets {owner/name: {path: content}}; yields (endpoint, requests seen)."""
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            """Keep quiet."""

        def reply(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self) -> None:
            seen.append(f"{self.command} {self.path}")
            path = self.path.split("?")[0].strip("/")
            for repo, files in repos.items():
                commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
                if path.startswith(f"api/datasets/{repo}/tree/"):
                    entries = [
                        {"type": "file", "path": name, "size": len(data), "oid": commit}
                        for name, data in files.items()
                    ]
                    return self.reply(200, json.dumps(entries).encode())
                if path.startswith(f"api/datasets/{repo}"):
                    siblings = [{"rfilename": name} for name in files]
                    info = {"id": repo, "sha": commit, "siblings": siblings, "private": False}
                    return self.reply(200, json.dumps(info).encode())
                start = f"datasets/{repo}/resolve/"
                if path.startswith(start):
                    name = path.removeprefix(start).partition("/")[2]
                    if name in files:
                        etag = hashlib.sha256(files[name]).hexdigest()
                        return self.reply(200, files[name], ETag=f'"{etag}"', X_Repo_Commit=commit)
                    return self.reply(404, b"", X_Error_Code="EntryNotFound")
            return self.reply(404, b"", X_Error_Code="RepoNotFound")

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
