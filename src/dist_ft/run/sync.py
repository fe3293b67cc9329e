"""The records of a run at a URL: files that grow are kept there as numbered segments, others whole.

`ledger.jsonl` is the folder `ledger.jsonl.d` of segments `00000007-<writer>`, whole lines each, to be read in order.
A segment is created and never replaced, so that of two drivers none can take away what the other has written.
"""

from __future__ import annotations

import json
import logging
import threading
import uuid
from typing import Any

from dist_ft.errors import StorageError
from dist_ft.layout import GROWING
from dist_ft.run.place import Run
from dist_ft.storage.publish import write_whole
from dist_ft.storage.retry import retried

logger = logging.getLogger(__name__)

SEND_EVERY_S = 30.0
_SENT = ".sent.json"
_AT_THE_END = ("wandb/", "mlflow/")  # their files grow, and nobody reads them before
_RUN = "run.json"
_LAST_TRIES = 5  # each of which tries for half a minute


class Sender:
    """Sends what a coordinator writes, every 30 s and when asked. Does nothing where the files are in their place.

    A failure is logged, and what was to be sent goes with the next time; only `send` and `close` raise it. How far it
    has got is noted beside the files, so that a restarted coordinator goes on behind what was sent.

    Args:
        run: The run.
        every_s: Seconds between two sendings.

    Attributes:
        attempt: The attempt of whoever writes the files, 0 before the first. What is not rows, and replaces what was
            there, is sent only while no newer one has been taken.
    """

    def __init__(self, run: Run, every_s: float = SEND_EVERY_S) -> None:
        self.attempt = 0
        self._run = run
        self._every_s = every_s
        self._lock = threading.Lock()
        self._wanted, self._closed = threading.Event(), threading.Event()
        self._whole: dict[str, tuple[int, int]] = {}
        self._thread = threading.Thread(target=self._work, name="records", daemon=True)
        if run.is_remote:
            self._state = self._read_state()
            self._thread.start()

    def soon(self) -> None:
        """Has the background thread send now."""
        self._wanted.set()

    def send(self) -> None:
        """Sends the rows that are not there yet; when it returns, they are.

        Raises:
            OSError: They are not.
        """
        if self._run.is_remote:
            with self._lock:
                self._send_rows()

    def close(self) -> None:
        """Sends everything, run.json last, and ends.

        Raises:
            StorageError: Something could not be sent, though it was tried for minutes.
        """
        if not self._run.is_remote or self._closed.is_set():
            return
        self._closed.set()
        self._wanted.set()
        self._thread.join()
        try:  # each try has further tries of its own
            retried(
                lambda: self._send_all(is_end=True),
                "the last records",
                first_wait_s=0.0,
                num_tries=_LAST_TRIES,
                may_pass=lambda error: isinstance(error, OSError),
            )
        except OSError as error:
            raise StorageError(f"the run's records did not all get to the store: {error}") from error

    def _work(self) -> None:
        while not self._closed.is_set():
            self._wanted.wait(self._every_s)
            self._wanted.clear()
            if self._closed.is_set():
                return
            try:
                self._send_all()
            except OSError as error:
                logger.warning("records stay in %s for now: %s", self._run.path, error)

    def _send_all(self, is_end: bool = False) -> None:
        with self._lock:
            self._send_rows()
            if not self._is_newest():
                return
            for name in sorted(self._other_files(), key=lambda name: name == _RUN):
                if is_end or not name.startswith(_AT_THE_END):
                    self._send_whole(name)

    def _send_rows(self) -> None:
        for name in GROWING:
            while data := self._new_rows(name):
                state = self._state["files"][name]
                segment = f"{name}.d/{state['next']:08d}-{self._state['writer']}"
                if self._run.store.create_exclusive(segment, data):
                    state["bytes"] += len(data)
                else:  # by this coordinator before it was restarted, which did not get to note it
                    state["bytes"] += self._run.store.size(segment)
                state["next"] += 1
                self._write_state()

    def _is_newest(self) -> bool:
        taken = self._run.store.names("attempts")
        return taken[-1:] == [f"attempts/{self.attempt:04d}.json"] if self.attempt else not taken

    def _new_rows(self, name: str) -> bytes:
        path = self._run.path / name
        if not path.exists():
            return b""
        with path.open("rb") as file:
            file.seek(self._state["files"][name]["bytes"])
            data = file.read()
        return data[: data.rfind(b"\n") + 1]

    def _other_files(self) -> list[str]:
        root = self._run.path
        names = (path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
        return [name for name in names if name not in GROWING and not any(p.startswith(".") for p in name.split("/"))]

    def _send_whole(self, name: str) -> None:
        path = self._run.path / name
        try:
            stat = path.stat()
            stamp = (stat.st_mtime_ns, stat.st_size)
            if self._whole.get(name) != stamp:
                self._run.store.put(name, [path.read_bytes()])
                self._whole[name] = stamp
        except FileNotFoundError:
            return  # replaced at this moment: next time

    def _read_state(self) -> dict[str, Any]:
        """Goes on behind what was sent; of files that were just fetched that is all they hold."""
        path = self._run.path / _SENT
        if path.exists():
            state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return state
        files = {}
        for name in GROWING:
            here = self._run.path / name
            numbers = [int(segment.rsplit("/", 1)[1][:8]) for segment in self._run.store.names(f"{name}.d")]
            files[name] = {"bytes": here.stat().st_size if here.exists() else 0, "next": max(numbers, default=0) + 1}
        self._state = {"writer": uuid.uuid4().hex[:8], "files": files}
        self._write_state()
        return self._state

    def _write_state(self) -> None:
        # It lies beside the rows, in scratch that does not outlive the machine.
        write_whole(self._run.path / _SENT, json.dumps(self._state), is_durable=False)
