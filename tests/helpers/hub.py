"""A hub on this machine that has one data set, as far as its client libraries ask: enough to fetch its files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def serve_dataset(root: Path, hub_id: str) -> Iterator[str]:
    """Serves a folder as the data set `hub_id`; yields the address for `HF_ENDPOINT`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(root, hub_id))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _entries(root: Path, under: str, is_recursive: bool) -> list[dict[str, Any]]:
    found = []
    for path in sorted((root / under).rglob("*") if is_recursive else (root / under).glob("*")):
        name = str(path.relative_to(root))
        kind, size = ("directory", 0) if path.is_dir() else ("file", path.stat().st_size)
        found.append({"type": kind, "path": name, "oid": hashlib.sha1(name.encode()).hexdigest(), "size": size})
    return found


def _handler(root: Path, hub_id: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            url = urlparse(self.path)
            path = unquote(url.path)
            if path == "/":
                self.send(200, b"")
            elif path.startswith(f"/datasets/{hub_id}/resolve/"):
                self.send_file(root / path.split("/", 6)[6])
            elif path.startswith(f"/api/datasets/{hub_id}/tree/"):
                under = "/".join(path.split("/")[7:])
                entries = _entries(root, under, "recursive=true" in url.query.lower())
                self.send(200 if entries else 404, json.dumps(entries).encode(), "EntryNotFound")
            elif path.startswith(f"/api/datasets/{hub_id}"):
                self.send(200, json.dumps({"id": hub_id, "sha": COMMIT, "siblings": [], "tags": []}).encode())
            else:
                self.send(404, b"{}", "RepoNotFound")

        def send_file(self, path: Path) -> None:
            if path.is_file():
                self.send(200, path.read_bytes())
            else:
                self.send(404, b"{}", "EntryNotFound")

        def send(self, status: int, body: bytes, code: str | None = None) -> None:
            self.send_response(status)
            headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
            headers |= {"Content-Length": str(len(body)), "Content-Type": "application/json"}
            headers |= {"X-Error-Code": code} if code and status == 404 else {}
            for key, value in headers.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            """Says nothing."""

        do_GET = do_HEAD = do_POST = answer

    return Handler
