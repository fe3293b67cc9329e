"""A stand-in for W&B's server on loopback, as far as a run needs one: it keeps what arrives and may answer badly.

Every second request that carries rows is answered by the next mood: `429` and `500` as such, `lost` keeps the rows and
answers 500, `dropped` hangs up before it has read them, `late` answers after the client has given up.
"""

from __future__ import annotations

import contextlib
import http.server
import itertools
import json
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from tests.helpers.json_handler import JsonHandler

MOODS = ("lost", 429, "late", 500, "dropped")
CLIENT_TIMEOUT_S = 1


@dataclass
class WandbServer:
    """The server.

    Attributes:
        port: Its port, which a later server may take over.
        history: Line number → row of the run's history.
        had: Moods that a request has met.
        is_moody: Whether it has any.
    """

    port: int = 0
    history: dict[int, dict[str, Any]] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    had: set[int | str] = field(default_factory=set)
    is_moody: bool = False

    def start(self) -> WandbServer:
        """Listen; a server that was stopped goes on with what it has."""
        made = {"known": self, "moods": itertools.cycle(MOODS), "num": itertools.count(1)}
        handler = type("Handler", (_Handler,), made)
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def stop(self) -> None:
        """Refuse connections from now on."""
        self._server.shutdown()
        self._server.server_close()

    @property
    def steps(self) -> list[int]:
        """`train/step` of the rows with a loss, in the order of the history."""
        rows = [self.history[line] for line in sorted(self.history)]
        return [row["train/step"] for row in rows if "train/loss" in row]

    def keep(self, body: dict[str, Any]) -> None:
        """Take the lines of a request."""
        for name, part in body.get("files", {}).items():
            if name == "wandb-history.jsonl":
                for line, text in enumerate(part["content"], start=part["offset"]):
                    self.history[line] = json.loads(text)
            elif name == "wandb-summary.json":
                self.summary |= json.loads(part["content"][-1])

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """Answer a GraphQL request."""
        entity = {"id": "ZW50", "name": "me"}
        project = {"id": "cHJq", "name": "project", "entity": entity}
        if "upsertBucket" in query:
            bucket = {"id": "cnVu", "name": variables.get("name"), "displayName": "name", "project": project}
            return {"upsertBucket": {"bucket": bucket, "inserted": not self.history}}
        if "createRunFiles" in query:
            url = f"http://127.0.0.1:{self.port}/upload/"
            files = [{"name": name, "uploadUrl": url + name} for name in variables["files"]]
            return {"createRunFiles": {"runID": "cnVu", "uploadHeaders": [], "files": files}}
        if "RunResumeStatus" in query:
            return {"model": {**project, "bucket": self._bucket() if self.history else None}}
        return {}

    def _bucket(self) -> dict[str, Any]:
        last = json.dumps(self.history[max(self.history)])
        return {
            "id": "cnVu", "name": "abc12345", "displayName": "name", "summaryMetrics": json.dumps(self.summary),
            "historyLineCount": max(self.history) + 1, "historyTail": json.dumps([last]), "eventsLineCount": 0,
            "eventsTail": "[]", "logLineCount": 0, "config": "{}", "tags": [], "notes": "", "wandbConfig": '{"t": 1}',
        }  # fmt: skip


class _Handler(JsonHandler):
    known: WandbServer
    moods: itertools.cycle[int | str]
    num: itertools.count[int]

    def do_POST(self) -> None:
        has_rows = self.path.endswith("/file_stream")
        mood = next(self.moods) if self.known.is_moody and has_rows and next(self.num) % 2 == 0 else 200
        self.known.had.add(mood)
        if mood == "dropped":
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if mood in (429, 500):
            self.answer(int(mood), b"{}")
            return
        found: dict[str, Any] = {}
        if has_rows:
            self.known.keep(json.loads(body))
        elif self.path == "/graphql":
            asked = json.loads(body)
            found = {"data": self.known.answer(asked["query"], asked.get("variables") or {})}
        if mood == "late":
            time.sleep(2 * CLIENT_TIMEOUT_S)  # what is under test is a server that is slower than the limit
        with contextlib.suppress(OSError):
            self.answer(500 if mood == "lost" else 200, json.dumps(found).encode())

    do_GET = do_PUT = do_POST
