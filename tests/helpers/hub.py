"""A hub on loopback: enough of its protocol to resolve, list and fetch one model."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

MODEL = "someone/tiny"


@dataclass
class Hub:
    """What the hub holds, and what it was asked.

    Attributes:
        commits: Files of each commit.
        branches: Commit of each branch.
        token: Who asks without it is told that the model is gated; None lets everybody in.
        is_private: Who may not read is told that there is no such model.
        breaks_off: Names of files of which half is sent, once each.
        status: Sent in place of any answer.
        sent: How often each file was sent, whole or in part.
        ranges: Ranges that were asked for.
        url: Where it listens.
    """

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    token: str | None = None
    is_private: bool = False
    breaks_off: set[str] = field(default_factory=set)
    status: int | None = None
    sent: Counter[str] = field(default_factory=Counter)
    ranges: list[str] = field(default_factory=list)
    url: str = ""

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Adds a commit to a branch and returns it."""
        name = hashlib.sha1(json.dumps({k: v.hex() for k, v in files.items()}).encode()).hexdigest()
        self.commits[name] = files
        self.branches[branch] = name
        return name


def files_of(directory: Path) -> dict[str, bytes]:
    """The files of a model directory."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Serves a hub while the block runs."""

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""

    def _answer(self, with_body: bool) -> None:
        hub, path = self.hub, self.path.split("?")[0].removeprefix("/")
        may_read = hub.token is None or self.headers.get("Authorization") == f"Bearer {hub.token}"
        if hub.status is not None:
            return self._send(hub.status, b"", {})
        is_api = path.startswith("api/models/")
        name, _, rest = path.removeprefix("api/models/").partition(f"{MODEL}")
        if name or (hub.is_private and not may_read):
            return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        kind, _, rest = rest.strip("/").partition("/")
        revision, _, file = (rest or "main").partition("/")
        commit = hub.branches.get(revision, revision)
        if commit not in hub.commits:
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        files = hub.commits[commit]
        if is_api and kind == "tree":
            rows = [{"type": "file", "path": k, "size": len(v), "oid": _etag(v)} for k, v in files.items()]
            return self._send(200, json.dumps(rows).encode(), {})
        if is_api:
            return self._send(200, json.dumps({"id": MODEL, "sha": commit, "siblings": []}).encode(), {})
        if not may_read:
            return self._send(401, b"", {"X-Error-Code": "GatedRepo"})
        return self._send_file(file, files[file], commit, with_body)

    def _send_file(self, name: str, content: bytes, commit: str, with_body: bool) -> None:
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_etag(content)}"', "Accept-Ranges": "bytes"}
        asked = self.headers.get("Range")
        first = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
        if asked:
            self.hub.ranges.append(asked)
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        if with_body:
            self.hub.sent[name] += 1
        is_cut = with_body and name in self.hub.breaks_off
        if is_cut:
            self.hub.breaks_off.remove(name)
        self._send(206 if asked else 200, content[first:], headers, with_body, is_cut)

    def _send(
        self, status: int, body: bytes, headers: dict[str, str], with_body: bool = True, is_cut: bool = False
    ) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body[: len(body) // 2] if is_cut else body)
        self.close_connection = is_cut


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
