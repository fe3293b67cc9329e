"""Gives readers the files of token shards, in place or as copies that all ranks and runs of a machine share.

A store that is a directory is read in place. From any other store, a file is copied once: under a lock, to a temporary
name, checked against the hash in its `ShardInfo`, then renamed, so that nobody reads a partial copy. The copies take at
most a configured part of the disk; the least recently used are deleted. A rank may still have mapped such a copy: on
Linux and macOS a deleted file stays readable while it is mapped, and its space is freed afterwards.
"""

from __future__ import annotations

import os
import random
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import xxhash
from filelock import FileLock, Timeout

from dist_ft.config.data_sections import LoaderConfig
from dist_ft.data.shards.shard_file import ARROW, INFO, ShardInfo, map_file, read_info
from dist_ft.data.shards.split import PreparedSplit
from dist_ft.data.stream.token_shards import DAMAGED, ShardFile, TokenShards
from dist_ft.errors import DataError, DataUnavailableError, DistFtError, StorageError
from dist_ft.layout import user_cache_dir
from dist_ft.storage.objects import open_store
from dist_ft.storage.store import LocalStore, Store
from dist_ft.storage.urls import shown_url

FIRST_PAUSE_S = 0.5
"""Wait after the first failed try; it doubles after each further one."""
MAX_PAUSE_S = 30.0
READY_POLL_S = 2.0
"""Wait between two checks for a shard that is being prepared."""
ROOM_POLL_S = 0.05
"""Wait between two checks for disk space that running copies have reserved."""
READY_LIMIT_S = 7200.0
"""Longest wait for a shard in mode `stream`; the coordinator judges whether a wait is too long."""
LOCK_LIMIT_S = 900.0
"""Longest wait for another process that copies the same file."""
_CHUNK_BYTES = 8 << 20
_NUM_LOCKS = 64
_OURS = re.compile(r"\.?.+\.[0-9a-f]{16}(\.arrow|\.index\.npy)(\.part)?")
T = TypeVar("T")


@dataclass(frozen=True)
class Replica:
    """A store of prepared data.

    Attributes:
        shown: Path or URL without secrets, for messages.
        store: The store.
    """

    shown: str
    store: Store


class ShardCache:
    """The files of shards on this machine. Safe for many threads and processes.

    Args:
        replicas: Stores that hold the same data, in the order in which they are tried.
        loader: `data.loader`.
        ready_limit_s: Longest wait for a shard that is not prepared yet; 0 if all are prepared.
        first_pause_s: See `FIRST_PAUSE_S`.
    """

    def __init__(
        self,
        replicas: Sequence[Replica],
        loader: LoaderConfig,
        ready_limit_s: float = 0.0,
        first_pause_s: float = FIRST_PAUSE_S,
    ) -> None:
        self._replicas, self._loader = replicas, loader
        self._ready_limit_s, self._first_pause_s = ready_limit_s, first_pause_s
        self._directory = Path(loader.cache_dir).expanduser() if loader.cache_dir else user_cache_dir() / "shards"
        self._limit_bytes = int(loader.cache_gib * (1 << 30))
        self._closed = threading.Event()

    @property
    def is_local(self) -> bool:
        """Whether all data is read in place."""
        return all(isinstance(replica.store, LocalStore) for replica in self._replicas)

    def info(self, key: str) -> ShardInfo:
        """Return the description of a shard, as soon as the shard is prepared.

        Raises:
            DataError: The shard does not exist, or its description is damaged.
            DataUnavailableError: The shard is not prepared in time, no replica answers, or the cache was closed.
        """
        deadline = time.monotonic() + self._ready_limit_s
        while True:
            try:
                return self._from_any(f"{key}{INFO}", lambda replica: read_info(replica.store, key))
            except FileNotFoundError:
                if time.monotonic() >= deadline:
                    shown = ", ".join(replica.shown for replica in self._replicas)
                    if not self._ready_limit_s:
                        raise DataError(
                            f"shard {key} is not at {shown}; resume, and what is missing is prepared anew"
                        ) from None
                    raise DataUnavailableError(
                        f"shard {key} was not prepared within {self._ready_limit_s:g} s (looked at {shown}); see the "
                        "log of the preparation, or set data.preparation=ahead"
                    ) from None
            self._pause(min(READY_POLL_S, self._first_pause_s * 4))

    def open(self, info: ShardInfo, ending: str, damaged: Collection[Path] = ()) -> ShardFile:
        """Map a file of a shard, after copying it to this machine if it is elsewhere.

        Args:
            info: Description of the shard.
            ending: Ending of the file.
            damaged: Files on this machine that turned out to be damaged.

        Raises:
            DataError: Every replica has lost the file or holds a damaged one.
            DataUnavailableError: No replica gives the whole file; the message names each with its reason.
            StorageError: The copy cannot be written.
        """
        name = f"{info.key}{ending}"
        try:
            return self._from_any(name, lambda replica: self._open_at(replica, info, ending, damaged))
        except FileNotFoundError:
            replicas = ", ".join(replica.shown for replica in self._replicas)
            raise DataError(
                f"shard file {name} is not at {replicas}; resume, and what is missing is made anew"
            ) from None

    def close(self) -> None:
        """End all waits, in this and other threads, with an error."""
        self._closed.set()

    def _from_any(self, name: str, attempt: Callable[[Replica], T]) -> T:
        """Try each replica in turn, round after round, as long as another try can help."""
        reasons: dict[str, str] = {}
        for number in range(self._loader.max_tries):
            if number:
                self._pause(min(MAX_PAUSE_S, self._first_pause_s * 2 ** (number - 1)))
            num_missing = num_damaged = 0
            for replica in self._replicas:
                try:
                    return attempt(replica)
                except FileNotFoundError:
                    num_missing += 1
                    reasons[replica.shown] = "it is not there"
                except (StorageError, _ClosedError):
                    raise
                except (OSError, DistFtError) as error:
                    num_damaged += isinstance(error, DataError) and isinstance(replica.store, LocalStore)
                    reasons[replica.shown] = f"{type(error).__name__}: {error}"
            if num_missing == len(self._replicas):
                raise FileNotFoundError(name)
            if num_missing + num_damaged == len(self._replicas):
                raise DataError(_explain(name, reasons))
        raise DataUnavailableError(_explain(name, reasons))

    def _open_at(self, replica: Replica, info: ShardInfo, ending: str, damaged: Collection[Path]) -> ShardFile:
        if isinstance(replica.store, LocalStore):
            path = replica.store.root / f"{info.key}{ending}"
            if path in damaged:
                raise DataError(f"{path} {DAMAGED}")
            return ShardFile(path, map_file(path))
        # The hash is part of the name, so a shard that was prepared again with other bytes is another copy.
        path = self._directory / f"{info.key}.{_hash(info, ending)[:16]}{ending}"
        with _disk_errors(self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
            if path in damaged:
                path.unlink(missing_ok=True)
        if (data := self._mapped_copy(path, info, ending)) is None:
            with self._locked(_lock_of(path)):
                # Another process may have made the copy while this one waited for the lock.
                if (data := self._mapped_copy(path, info, ending)) is None:
                    data = self._copy(replica.store, path, info, ending)
        return ShardFile(path, data)

    def _mapped_copy(self, path: Path, info: ShardInfo, ending: str) -> pa.Buffer | None:
        try:
            data = map_file(path)
        except FileNotFoundError:
            return None
        with suppress(OSError):  # deleted, or another user's: it is mapped already, and only looks less recently used
            os.utime(path)
        return data if data.size == _num_bytes(info, ending) else None

    def _copy(self, store: Store, path: Path, info: ShardInfo, ending: str) -> pa.Buffer:
        """Copy a file durably, check its hash and map it. The caller holds the lock of the copy."""
        part, name = path.with_name(f".{path.name}.part"), f"{info.key}{ending}"
        num_bytes, hasher = _num_bytes(info, ending), xxhash.xxh3_128()
        self._reserve(part, num_bytes, name)
        try:
            with part.open("r+b") as file:
                for start in range(0, num_bytes, _CHUNK_BYTES):
                    self._check_open()
                    data = store.read_range(name, start, min(_CHUNK_BYTES, num_bytes - start))
                    hasher.update(data)
                    with _disk_errors(self._directory):
                        file.write(data)
                        file.flush()
                with _disk_errors(self._directory):
                    os.fsync(file.fileno())
            if hasher.hexdigest() != _hash(info, ending):
                raise DataError(f"{num_bytes} bytes came, but they are not those that were written; delete it there")
            with _disk_errors(self._directory):
                mapped = map_file(part)
                part.replace(path)
            return mapped
        finally:
            part.unlink(missing_ok=True)

    def _reserve(self, part: Path, num_bytes: int, name: str) -> None:
        """Reserves disk space for a copy before its first byte, so that running copies count, too.

        Waits if only running copies could make room: once finished, they can be deleted.
        """
        if num_bytes > self._limit_bytes:
            raise StorageError(
                f"data.loader.cache_gib={self._loader.cache_gib:g} is less than the one file {name} ({num_bytes} bytes)"
                "; raise it"
            )
        deadline = time.monotonic() + LOCK_LIMIT_S
        while True:
            with self._locked("space"), _disk_errors(self._directory):
                part.unlink(missing_ok=True)  # a process that died has left it: this one holds the lock of the copy
                if self._make_room(num_bytes, _lock_of(part)):
                    with part.open("wb") as file:
                        file.truncate(num_bytes)
                    return
            if time.monotonic() > deadline:
                raise DataUnavailableError(
                    f"data.loader.cache_gib={self._loader.cache_gib:g} has been taken up by copies under way for "
                    f"{LOCK_LIMIT_S:g} s; look for a process that hangs"
                )
            self._pause(ROOM_POLL_S)

    def _make_room(self, num_bytes: int, held_lock: str) -> bool:
        """Delete the least recently used copies until a file fits; return whether it fits."""
        found = []
        for entry in os.scandir(self._directory):
            if _OURS.fullmatch(entry.name):  # the directory may hold other files, too
                with suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    found.append((status.st_mtime, status.st_size, Path(entry.path)))
        used = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if used + num_bytes <= self._limit_bytes:
                break
            if path.suffix != ".part" or self._is_abandoned(path, held_lock):
                path.unlink(missing_ok=True)
                used -= size
        return used + num_bytes <= self._limit_bytes

    def _is_abandoned(self, part: Path, held_lock: str) -> bool:
        """Return whether the writer of a copy has died: the system frees the lock of a process that dies."""
        name = _lock_of(part)
        if name == held_lock:
            return True
        lock = FileLock(self._directory / f".{name}.lock", thread_local=False, is_singleton=False)
        with suppress(Timeout), lock.acquire(timeout=0):
            return True
        return False

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Hold a lock of the cache directory; the system frees it when its holder dies."""
        deadline = time.monotonic() + LOCK_LIMIT_S
        lock = FileLock(self._directory / f".{name}.lock", thread_local=False, is_singleton=False)
        while True:
            try:
                with _disk_errors(self._directory):
                    lock.acquire(timeout=1.0, poll_interval=0.02)
                break
            except Timeout:
                self._check_open()
                if time.monotonic() > deadline:
                    raise DataUnavailableError(
                        f"{lock.lock_file} is held by another process for {LOCK_LIMIT_S:g} s; look for one that hangs"
                    ) from None
        try:
            yield
        finally:
            lock.release()

    def _pause(self, seconds: float) -> None:
        """Wait a little longer or shorter than asked, so that many ranks do not try again at once."""
        self._closed.wait(seconds * random.uniform(0.5, 1.5))
        self._check_open()

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise _ClosedError("the loader was closed while it waited for data")


def open_split(split: PreparedSplit, loader: LoaderConfig) -> TokenShards:
    """Open the shards of a split for reading, from its store or one of `loader.replicas`."""
    addresses = (split.address, *loader.replicas)
    replicas = [Replica(shown_url(address), open_store(address)) for address in addresses]
    if not split.is_complete:
        cache = ShardCache(replicas, loader, READY_LIMIT_S)
        return TokenShards(split.read_keys(), cache, made_sizes=split.made_sizes, score_key=split.score_key)
    sizes = np.array(split.read_sizes(), np.int64)
    return TokenShards(split.read_keys(), ShardCache(replicas, loader), sizes, score_key=split.score_key)


class _ClosedError(DataUnavailableError):
    """The cache was closed while a call waited. This is not a failure: nobody wants the data any more."""


def _explain(name: str, reasons: dict[str, str]) -> str:
    tried = "; ".join(f"{shown}: {reason}" for shown, reason in reasons.items())
    return f"shard file {name} cannot be read. {tried}"


def _lock_of(path: Path) -> str:
    """Return the name of a copy's lock, given the path of the finished or of the unfinished copy."""
    name = path.name.removeprefix(".").removesuffix(".part")
    return f"copy-{int(xxhash.xxh3_64_intdigest(name.encode())) % _NUM_LOCKS}"


def _hash(info: ShardInfo, ending: str) -> str:
    return info.hash if ending == ARROW else info.index_hash


def _num_bytes(info: ShardInfo, ending: str) -> int:
    return info.num_bytes if ending == ARROW else info.num_index_bytes


@contextmanager
def _disk_errors(directory: Path) -> Iterator[None]:
    """Turn an error of the cache's own disk into one that says so."""
    try:
        yield
    except Timeout:  # a lock's timeout is an OSError, too
        raise
    except OSError as error:
        raise StorageError(
            f"data.loader.cache_dir={directory}: {error.strerror}; free some space, set data.loader.cache_gib lower, "
            "or name another directory"
        ) from error
