"""Opens a run: its store, and a directory on this machine for files that are appended to or rewritten.

For a run in a directory, the two are the same and nothing is copied. For a run at a URL, the directory is scratch that
lives as long as the process: records are fetched into it, and `sync.py` sends what is written there.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import math
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError

from dist_ft.config import Config
from dist_ft.errors import CheckpointError, ConfigError, ExportError, StorageError, UsageError
from dist_ft.layout import FORMAT_VERSION, GROWING, RunDir, user_cache_dir
from dist_ft.storage.objects import open_store
from dist_ft.storage.publish import new_directory, replace_link
from dist_ft.storage.store import PART_BYTES, Store, file_parts
from dist_ft.storage.urls import is_url

logger = logging.getLogger(__name__)

RECORDS = ("run.json", "config.yaml", "sources.json", *GROWING)
"""The records that a driver needs to continue a run."""
_LOOK_EVERY_S = 5.0
_SEGMENT_READERS = 16
_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)


@dataclass(frozen=True)
class Run(RunDir):
    """A run that is open in this process. Its paths are paths of this machine.

    Attributes:
        address: Path or URL of the run directory, the same for all machines.
        store: The store at that address.
    """

    address: str
    store: Store = field(repr=False, compare=False)
    _scratch: Any = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        return self.address

    @property
    def is_remote(self) -> bool:
        """Whether files written under the paths must be sent to the store."""
        return is_url(self.address)

    @property
    def look_every_s(self) -> float:
        """Seconds that an answer of the store may be old; a request to an object store costs money and time."""
        return _LOOK_EVERY_S if self.is_remote else 0.0

    def fetch(self, *names: str) -> None:
        """Copy records from the store to their paths; records that the store does not have are skipped.

        Raises:
            StorageError: The store does not answer, or refuses.
        """
        if not self.is_remote:
            return
        try:
            for name in names:
                if name in GROWING:
                    self._fetch_rows(name)
                else:
                    with contextlib.suppress(FileNotFoundError):
                        (self.path / name).write_bytes(self.store.read(name))
        except OSError as error:
            raise StorageError(f"the run cannot be read: {error}") from error

    def _fetch_rows(self, name: str) -> None:
        """Fetch the segments of a growing file and write them as one file."""
        with ThreadPoolExecutor(_SEGMENT_READERS) as pool:
            parts = list(pool.map(self.store.read, self.store.names(f"{name}.d")))
        if parts:
            (self.path / name).write_bytes(b"".join(parts))

    def has(self, name: str) -> bool:
        """Return whether the run has an object of this name, or a folder that is not empty."""
        try:
            self.store.size(name)
        except FileNotFoundError:
            return bool(self.store.names(name))
        return True

    def address_of(self, name: str) -> str:
        """Return the path or URL of something in the run."""
        return f"{self.address}/{name}"

    def point(self, name: str, sibling: str) -> None:
        """Points a name such as `exports/final` at a sibling: by a link, or at a URL by a file of one line."""
        if self.is_remote:
            self.store.put(name, [f"{sibling}\n".encode()])
            return
        replace_link(self.path / name, sibling)

    def pointed_at(self, name: str) -> str | None:
        """Return the target that `point` gave a name, relative to the run; None if the target does not exist."""
        if not self.is_remote:
            found = (self.path / name).resolve()
            return f"exports/{found.name}" if found.is_dir() else None
        try:
            sibling = self.store.read(name).decode().strip()
        except FileNotFoundError:
            return None
        target = f"{PurePosixPath(name).parent}/{PurePosixPath(sibling).name}"
        return target if self.has(target) else None

    def ask_to_stop(self, facts: dict[str, Any]) -> None:
        """Leaves a request that the run checkpoint and stop; `facts` hold its `time`."""
        self.store.put(self.stop_request.name, [json.dumps({"format_version": FORMAT_VERSION, **facts}).encode()])

    def stop_asked_at(self) -> float | None:
        """Return when the run was asked to stop, in Unix time; None when it was not."""
        try:
            return float(json.loads(self.store.read(self.stop_request.name))["time"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            return math.inf  # a file that someone else wrote: that it exists is the request

    def forget_stop(self) -> None:
        """Remove the request, if any."""
        with contextlib.suppress(FileNotFoundError):
            self.store.delete(self.stop_request.name)


def open_run(address: str | Path, scratch: Path | None = None) -> Run:
    """Open a run; send nothing to the store yet.

    Args:
        address: Path or URL of the run directory.
        scratch: For a URL, the directory of another process of this machine to use; None makes one.

    Raises:
        ConfigError: See `open_store`.
    """
    if not is_url(str(address)):
        path = Path(address).absolute()
        return Run(path, str(path), open_store(str(path)))
    url = str(address).rstrip("/")
    store = open_store(url)
    owned = None if scratch else tempfile.TemporaryDirectory(prefix="dist-ft-run-")  # removed with the process
    return Run(scratch or Path(owned.name if owned else ""), url, store, owned)


def node_dir(address: str) -> RunDir:
    """Return the directory for the rank logs of this machine: the run itself, or a folder of the user's cache."""
    if not is_url(address):
        return RunDir(Path(address))
    return RunDir(user_cache_dir() / "runs" / hashlib.sha256(address.encode()).hexdigest()[:16])


def send_logs(address: str, names: Iterable[str]) -> None:
    """Move logs from `node_dir` to a run at a URL. A log that cannot be sent stays, with a warning."""
    if not is_url(address):
        return
    store, here = open_store(address), node_dir(address).path
    for name in names:
        try:
            if (here / name).is_file():
                store.put(name, file_parts(here / name))
                (here / name).unlink()
        except (OSError, CheckpointError) as error:
            logger.warning("%s stays in %s: %s", name, here, error)


@contextlib.contextmanager
def published(to: str) -> Iterator[Path]:
    """Yield an empty directory, and publish its files at a path or URL when the block succeeds.

    Raises:
        ExportError: The path or URL exists already, or there is no room for the files.
    """
    if is_url(to):
        with tempfile.TemporaryDirectory(prefix="dist-ft-export-") as scratch, _names_place(scratch, "TMPDIR"):
            yield Path(scratch)
            _send_directory(Path(scratch), to)
        return
    target = Path(to).absolute()
    if target.exists():
        raise ExportError(f"{target} exists; choose another directory or remove it")
    with _names_place(str(target), "--to or run.output_dir"), new_directory(target) as hidden:
        yield hidden


@contextlib.contextmanager
def _names_place(place: str, key: str) -> Iterator[None]:
    """Turn the refusal of a file system, which names no file once a file is open, into an error with the place.

    Raises:
        ExportError: There is no room, or the place may not be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        reason = error.strerror
    except SafetensorError as error:
        if "os error" not in str(error):
            raise
        reason = str(error)
    else:
        return
    raise ExportError(
        f"the export cannot be written to {place} ({reason}); make room there, or choose another place with {key}. "
        "Nothing of it was kept, and the checkpoints stay"
    )


@contextlib.contextmanager
def local_copy(address: str) -> Iterator[Path]:
    """Yield the directory at a path, or a temporary copy of the one at a URL."""
    if not is_url(address):
        yield Path(address)
        return
    store = open_store(address)
    with tempfile.TemporaryDirectory(prefix="dist-ft-model-") as scratch:
        for name in store.names(""):
            target = Path(scratch) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as file:
                size = store.size(name)
                for start in range(0, size, PART_BYTES):
                    file.write(store.read_range(name, start, min(PART_BYTES, size - start)))
        yield Path(scratch)


def _send_directory(directory: Path, url: str) -> None:
    """Send the files of a directory, JSON files last, because readers recognise a directory by them."""
    store = open_store(url)
    if store.names(""):
        raise ExportError(f"{url} exists; choose another name or remove it")
    files = [path for path in directory.rglob("*") if path.is_file()]
    for path in sorted(files, key=lambda path: (path.suffix == ".json", path)):
        store.put(path.relative_to(directory).as_posix(), file_parts(path))


def check_new_run(config: Config) -> None:
    """Refuses to write into a run directory that exists already.

    Raises:
        UsageError: The run directory exists.
        ConfigError: Its store does not answer, or refuses.
    """
    run_dir = open_run(config.run.address)
    try:
        is_taken = run_dir.has("")
    except OSError as error:
        raise ConfigError(f"run.output_dir={config.run.output_dir} cannot be used: {error}") from error
    if is_taken:
        raise UsageError(
            f"run directory {run_dir} exists; continue it with --resume, or choose another run.name or run.output_dir"
        )
