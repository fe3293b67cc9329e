"""The server dies at any change of its index, and the next one ends the job as an undisturbed one would.

`make test` takes every twenty-fifth change; `make soak` each of them.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from dist_ft.service.api_keys import add_key
from dist_ft.service.api_server import Settings, open_index
from tests.helpers.api_server import ENDS, chat_rows, wait_for
from tests.helpers.paths import ROOT

_EVERY = 25
_TRAIN = {"model": "tiny-random", "hyperparameters": {"n_epochs": 2, "batch_size": 6}, "seed": 1}


class _Mailbox(BaseHTTPRequestHandler):
    server: Any

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.server.seen.append(self.headers["webhook-id"])
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture(scope="module")
def mailbox() -> Iterator[HTTPServer]:
    made = HTTPServer(("127.0.0.1", 0), _Mailbox)
    made.seen = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


@dataclass
class Trial:
    """A store, and one server of it after the other."""

    store: Path
    key: str = ""
    url: str = ""
    process: subprocess.Popen[bytes] | None = None

    def serve(self, last_change: int) -> None:
        """Starts a server that dies before a change of the index; 0 is never."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "tests.helpers.mortal_server", str(self.store), str(port), str(last_change)]
        self.process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, env={**os.environ})
        wait_for(lambda: self.is_dead() or self.is_up())

    def is_dead(self) -> bool:
        assert self.process is not None
        return self.process.poll() is not None

    def is_up(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health").status_code == 200
        except httpx.TransportError:
            return False

    def ask(self, method: str, path: str, **sent: Any) -> Any:
        """Returns an answer as JSON; a server that is dead is followed by one that lives."""
        while True:
            try:
                answer = httpx.request(
                    method,
                    f"{self.url}/v1{path}",
                    timeout=60,
                    **sent,
                    headers={
                        "authorization": f"Bearer {self.key}",
                        "idempotency-key": "once",
                    },
                )
            except httpx.TransportError:
                assert self.process is not None
                assert self.process.wait(60) == 9
                self.serve(0)
                continue
            assert answer.status_code == 200, answer.text
            return answer.json()

    def close(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(60)


def outcome(store: Path, mailbox: HTTPServer, last_change: int) -> tuple[dict[str, Any], bool]:
    """Returns what a client sees in the end, without what is another in each store, and whether a server died."""
    with closing(Trial(store)) as trial:
        return _outcome(trial, mailbox, last_change)


def _outcome(trial: Trial, mailbox: HTTPServer, last_change: int) -> tuple[dict[str, Any], bool]:
    mailbox.seen.clear()  # type: ignore[attr-defined]
    store = trial.store
    index = open_index(Settings(store))
    trial.key = add_key(index, "admin", "default", "test", None)
    index.close()
    (store / "train.jsonl").write_bytes(chat_rows(12))
    trial.serve(0)
    hook = {
        "name": "n",
        "url": f"http://127.0.0.1:{mailbox.server_port}/",
        "event_types": ["fine_tuning.job.succeeded"],
    }
    trial.ask("POST", "/webhook_endpoints", json=hook)
    with (store / "train.jsonl").open("rb") as rows:
        file = trial.ask("POST", "/files", files={"file": rows}, data={"purpose": "fine-tune"})["id"]
    trial.close()
    trial.serve(last_change)
    job = trial.ask("POST", "/fine_tuning/jobs", json={**_TRAIN, "training_file": file})
    path = f"/fine_tuning/jobs/{job['id']}"
    wait_for(lambda: trial.ask("GET", path)["status"] in ENDS)
    wait_for(lambda: mailbox.seen)  # type: ignore[attr-defined]
    done = trial.ask("GET", path)
    events = trial.ask("GET", f"{path}/events?limit=100")["data"]
    checkpoints = trial.ask("GET", f"{path}/checkpoints")["data"]
    files = [entry["purpose"] for entry in trial.ask("GET", "/files")["data"]]
    (result,) = done["result_files"]
    text = httpx.get(f"{trial.url}/v1/files/{result}/content", headers={"authorization": f"Bearer {trial.key}"}).text
    jobs = trial.ask("GET", "/fine_tuning/jobs")["data"]
    has_died = trial.process is not None and last_change > 0 and trial.process.args[-1] == "0"  # type: ignore[index]
    starts = len(list((store / "launched").glob("*/job.json")))
    seen = {
        "status": done["status"], "tokens": done["trained_tokens"], "jobs": len(jobs), "files": sorted(files),
        "events": sorted(_plain(event["message"], done, file) for event in events),
        "ids": len({event["id"] for event in events}), "csv": text, "starts": starts,
        "checkpoints": [(c["step_number"], c["metrics"]) for c in checkpoints],
        "hooks": len(set(mailbox.seen)),  # type: ignore[attr-defined]
        "error": done["error"],
    }  # fmt: skip
    return json.loads(json.dumps(seen)), has_died


def _plain(message: str, job: dict[str, Any], file: str) -> str:
    for text, name in ((job["id"], "JOB"), (job["fine_tuned_model"] or "-", "MODEL"), (file, "FILE")):
        message = message.replace(text, name)
    return message


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, mailbox: HTTPServer) -> dict[str, Any]:
    found, _ = outcome(tmp_path_factory.mktemp("undisturbed"), mailbox, 0)
    assert (found["status"], found["hooks"], found["starts"], found["jobs"]) == ("succeeded", 1, 1, 1)
    return found


def try_every(step: int, folder: Path, mailbox: HTTPServer, undisturbed: dict[str, Any]) -> int:
    """Lets servers die before every so many changes until one outlives its job; returns how many died."""
    for count, change in enumerate(itertools.count(step, step)):
        found, has_died = outcome(folder / str(change), mailbox, change)
        assert found == undisturbed, f"died before change {change}"
        if not has_died:
            return count
    raise AssertionError


def test_a_server_that_dies_changes_nothing(tmp_path: Path, mailbox: HTTPServer, undisturbed: dict[str, Any]) -> None:
    assert try_every(_EVERY, tmp_path, mailbox, undisturbed) > 0


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_a_server_that_dies_anywhere_changes_nothing(
    tmp_path: Path, mailbox: HTTPServer, undisturbed: dict[str, Any]
) -> None:
    assert try_every(1, tmp_path, mailbox, undisturbed) > 20
