"""Sends the records of a run to its URL: growing files as numbered segments, other files whole.

`ledger.jsonl` is stored as a folder `ledger.jsonl.d` of segments `00000007-<writer>`, which hold whole lines and are
read in order. A segment is created and never replaced, so two drivers cannot overwrite each other's rows.
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
_AT_THE_END = ("wandb/", "mlflow/")  # their files grow, and nobody reads them before the end
_RUN = "run.json"
_LAST_TRIES = 5  # each lasts up to half a minute


class Sender:
    """Sends the records that a coordinator writes, every 30 s and on request. Does nothing for a run in a directory.

    In the background, a failure is logged and the next round sends again; only `send` and `close` raise. A file beside
    the records says how much was sent, so that a restarted coordinator continues from there.

    Args:
        run: The run.
        every_s: Seconds between two sendings.

    Attributes:
        attempt: The attempt of the writer, 0 before the first. Files that are replaced as a whole are sent only while
            no newer attempt exists.
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
        """Asks the background thread to send now."""
        self._wanted.set()

    def send(self) -> None:
        """Send all rows that the store does not have yet, and return when the store has them.

        Raises:
            OSError: The store did not take them.
        """
        if self._run.is_remote:
            with self._lock:
                self._send_rows()

    def close(self) -> None:
        """Send everything, run.json last, and end the thread.

        Raises:
            StorageError: A file could not be sent, after minutes of tries.
        """
        if not self._run.is_remote or self._closed.is_set():
            return
        self._closed.set()
        self._wanted.set()
        self._thread.join()
        try:  # each call to the store already tries several times
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
            except Exception as error:  # whatever it is: the thread must try again, or the run ends without records
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
                else:  # this coordinator sent it before a restart, but died before it could record that
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
            return  # the file is being replaced; the next round sends it

    def _read_state(self) -> dict[str, Any]:
        """Read how much was sent; without a saved state, all rows of the fetched files count as sent."""
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
        # Not durable: it lies beside the rows, in scratch that does not outlive the machine.
        write_whole(self._run.path / _SENT, json.dumps(self._state), is_durable=False)
