"""A real S3 peer on loopback: moto's server, with faults put in front of it. Faults are chosen per request."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import struct
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from moto.backends import get_backend
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

SECRET = "loopback-secret-key-0123456789"
_SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"

Application = Callable[..., Iterable[bytes]]


@dataclass
class Fault:
    """What goes wrong with requests that fit.

    Attributes:
        kind: `503` (nothing is done), `lost` (done, and the connection is reset), `truncated` (half of the body, and
            the connection ends), `slow` (the body drips for `slow_s`) or `unconditional` (a condition is ignored).
        method: HTTP method.
        pattern: Found in the path and query.
        times: How often, at most.
        every: Only each `every`-th request that fits.
    """

    kind: str
    method: str
    pattern: str
    times: int = 1
    every: int = 1
    slow_s: float = 0.3
    seen: int = field(default=0, init=False)
    done: int = field(default=0, init=False)

    def hits(self, method: str, address: str) -> bool:
        """Whether this request is to suffer; counts it."""
        if method != self.method or self.done >= self.times or not re.search(self.pattern, address):
            return False
        self.seen += 1
        if self.seen % self.every:
            return False
        self.done += 1
        return True


class S3Server:
    """S3 on loopback. `requests` are `METHOD path?query`, in the order of their arrival."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._app = DomainDispatcherApplication(create_backend_app)
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def environment(self) -> dict[str, str]:
        """What a client's environment needs."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "loopback",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def new_bucket(self) -> str:
        """Makes a bucket and returns its URL."""
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        self._backend.create_bucket(name, "us-east-1")
        return f"s3://{name}"

    def objects(self, bucket_url: str) -> dict[str, bytes]:
        """Returns all objects of a bucket."""
        found = ((name, self.object(f"{bucket_url}/{name}")) for name in self.names(bucket_url))
        return {name: data for name, data in found if data is not None}

    def names(self, bucket_url: str) -> list[str]:
        """Returns the names of all objects of a bucket."""
        return list(self._bucket(bucket_url).keys)

    def object(self, url: str) -> bytes | None:
        """Returns an object; None where there is none, or none any more."""
        keys = self._bucket(url).keys
        try:
            return bytes(keys[url.split("/", 3)[3]].value)
        except KeyError:
            return None

    def unfinished_uploads(self, bucket_url: str) -> int:
        """Returns how many multipart uploads were neither completed nor aborted."""
        return len(self._bucket(bucket_url).multiparts)

    def close(self) -> None:
        """Ends the server."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def _backend(self) -> Any:
        return get_backend("s3")["123456789012"]["aws"]

    def _bucket(self, url: str) -> Any:
        return self._backend.buckets[url.removeprefix("s3://").split("/")[0]]

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        method = environ["REQUEST_METHOD"]
        address = environ["PATH_INFO"] + (f"?{environ['QUERY_STRING']}" if environ["QUERY_STRING"] else "")
        with self._lock:
            self.requests.append(f"{method} {address}")
            fault = next((fault for fault in self.faults if fault.hits(method, address)), None)
        kind = fault.kind if fault else None
        if kind == "503":
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response("503 Slow Down", [("Content-Type", "application/xml")])
            return [_SLOW_DOWN]
        if kind == "unconditional":
            environ.pop("HTTP_IF_NONE_MATCH", None)
        # moto looks and then writes; S3 does both at once.
        with self._writing if method in ("PUT", "POST") else contextlib.nullcontext():
            body = b"".join(self._app(environ, start_response))
        if kind == "lost":
            connection: socket.socket = environ["werkzeug.socket"]
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()
            return []
        if kind == "truncated":
            return [body[: len(body) // 2]]  # under the length of the whole
        return _dripping(body, fault.slow_s) if fault and kind == "slow" else [body]


def _dripping(body: bytes, seconds: float) -> Iterator[bytes]:
    step = max(1, len(body) // 4)
    for start in range(0, len(body), step):
        time.sleep(seconds / 4)
        yield body[start : start + step]


@contextlib.contextmanager
def s3_server() -> Iterator[S3Server]:
    """Gives a server, and this process and its children the environment to reach it."""
    server = S3Server()
    names = [*server.environment, "AWS_PROFILE", "AWS_SESSION_TOKEN"]
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ.update(server.environment)
    try:
        yield server
    finally:
        server.close()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
