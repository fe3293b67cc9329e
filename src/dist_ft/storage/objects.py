"""Implements the `Store` protocol on object stores (S3, Google Cloud Storage, Azure) through fsspec.

A conditional put creates a name exclusively; the store decides who wins. Credentials come only from the environment
that each store's own SDK reads.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, TypeVar

from fsspec.core import url_to_fs

from dist_ft.errors import CheckpointError, ConfigError, StorageError
from dist_ft.storage.retry import FIRST_WAIT_S, error_code, http_status, retried, will_pass
from dist_ft.storage.store import LocalStore, Store
from dist_ft.storage.urls import AZURE, GOOGLE, S3, checked_store_url, is_url, redacted

T = TypeVar("T")

CHUNK_BYTES = 32 * 2**20
"""Bytes of one part of an upload; two parts are held at a time. S3 takes 10,000 parts, so objects up to 312 GiB."""
_WRITER = "dist-ft-writer"
_CONNECT_LIMIT_S = 10
_SILENCE_LIMIT_S = 60  # a request that gets no byte for so long is made again


def open_store(address: str) -> Store:
    """Open the store at a path or URL; send nothing yet.

    Raises:
        ConfigError: The URL has secrets, has no bucket, or names a store without exclusive creation.
    """
    return ObjectStore(address) if is_url(address) else LocalStore(Path(address))


def check_exclusive_creation(store: Store) -> None:
    """Check that the store creates a name exclusively, which fencing rests on.

    A server that speaks S3 may ignore the condition of a conditional put.

    Raises:
        StorageError: A second writer replaced the first, or nothing can be written at all.
    """
    probe = f".probe-{uuid.uuid4().hex}"
    try:
        is_exclusive = store.create_exclusive(probe, b"first") and not store.create_exclusive(probe, b"second")
        store.delete(probe)
    except (OSError, CheckpointError) as error:
        raise StorageError(f"cannot write where the run is to be kept: {error}") from error
    if not is_exclusive:
        raise StorageError(
            "a store without exclusive creation is refused: a second writer of a name replaced the first; "
            "use a server that honours `If-None-Match: *`"
        )


class ObjectStore:
    """A folder in a bucket. Each process opens connections of its own, because none survives a fork.

    Args:
        url: Such as `s3://bucket/folder`.
        first_wait_s: See `retried`.

    Raises:
        ConfigError: See `checked_store_url`.
    """

    def __init__(self, url: str, first_wait_s: float = FIRST_WAIT_S) -> None:
        self.url = checked_store_url(url)
        self._kind = _kind_of(self.url)
        self._first_wait_s = first_wait_s
        self._opened: _Opened | None = None

    def create_exclusive(self, name: str, data: bytes) -> bool:
        """See `Store`."""
        path, writer = self._path(name), uuid.uuid4().hex
        how = dict(self._kind.to_create)
        if self._kind.marks:
            how[self._kind.marks] = {_WRITER: writer}
        try:
            self._call(lambda fs: fs.pipe_file(path, data, **how), name)
        except FileExistsError:
            if not self._kind.marks:
                return False
            # The put may have succeeded and its answer been lost; a repeated put (aiohttp repeats silently) then finds
            # our own object.
            return bool(self._call(lambda fs: fs.getxattr(path, _WRITER), name) == writer)
        return True

    def put(self, name: str, parts: Iterable[bytes | memoryview]) -> None:
        """See `Store`. Memory is bounded. An upload that fails is aborted."""
        path, chunks = self._path(name), _chunks(parts)
        first = next(chunks, b"")
        second = next(chunks, None)
        if second is None:
            self._call(lambda fs: fs.pipe_file(path, first), name)
        else:
            self._kind.upload(self._call, path, name, chain((first, second), chunks))

    def read(self, name: str) -> bytes:
        """See `Store`."""
        path = self._path(name)
        return bytes(self._call(lambda fs: fs.cat_file(path), name))

    def read_range(self, name: str, start: int, count: int) -> bytes:
        """See `Store`."""
        path, data = self._path(name), b""
        if count == 0:
            self.size(name)
            return data
        try:
            data = self._call(lambda fs: fs.cat_file(path, start=start, end=start + count), name)
        except OSError as error:
            if http_status(error) != 416:  # no byte of the range is there
                raise
        if len(data) != count:
            raise CheckpointError(f"{self._shown(name)} ends at byte {start + len(data)}, expected {start + count}")
        return bytes(data)

    def size(self, name: str) -> int:
        """See `Store`."""
        path = self._path(name)
        info = self._call(lambda fs: fs.info(path), name)
        if info["type"] != "file":
            raise FileNotFoundError(self._shown(name))
        return int(info["size"])

    def names(self, prefix: str) -> list[str]:
        """See `Store`."""
        found = (self._name(path) for path in self._find(prefix))
        below = f"{PurePosixPath(prefix)}/" if PurePosixPath(prefix).name else ""
        return sorted(name for name in found if name.startswith(below) and not _is_hidden(name))

    def folders(self, prefix: str) -> list[str]:
        """See `Store`."""
        path = self._path(prefix)
        try:
            entries = self._call(lambda fs: fs.ls(path, detail=True), prefix)
        except FileNotFoundError:
            return []
        return sorted(self._name(entry["name"].rstrip("/")) for entry in entries if entry["type"] == "directory")

    def delete(self, prefix: str) -> None:
        """See `Store`. Deletes JSON files first, because a folder counts only with its JSON files."""
        if self._path(prefix) == self._root:
            raise CheckpointError(f"{prefix!r} is the whole of {self.url}; name a folder in it")
        found = self._find(prefix)
        for paths in ([p for p in found if p.endswith(".json")], [p for p in found if not p.endswith(".json")]):
            if paths:
                self._remove(paths, prefix)

    def _remove(self, paths: list[str], name: str) -> None:
        with contextlib.suppress(FileNotFoundError):  # somebody else was faster
            self._call(lambda fs: fs.rm(paths), name)

    def _find(self, prefix: str) -> list[str]:
        path = self._path(prefix)
        try:
            return list(self._call(lambda fs: fs.find(path), prefix))
        except FileNotFoundError:
            return []

    def _call(self, call: Callable[[Any], T], name: str) -> T:
        """Call the store, and try again when a failure may pass.

        Raises:
            ConnectionError: The store does not answer, or is too busy; the object itself may be fine.
            OSError: Any other failure; the message names the object.
        """
        with self._explained(name):
            fs = self._filesystem
            return retried(lambda: call(fs), self._shown(name), self._first_wait_s)

    @contextlib.contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        try:
            yield
        except (ConfigError, StorageError):
            raise
        except Exception as error:
            where = self._shown(name)
            if http_status(error) == 412 or isinstance(error, FileExistsError):
                raise FileExistsError(where) from error
            if isinstance(error, FileNotFoundError) and error_code(error) != "NoSuchBucket":
                raise FileNotFoundError(where) from error
            said = f"{where}: {type(error).__name__}: {str(error) or 'no answer'}"
            if isinstance(error, PermissionError):
                raise PermissionError(f"{said}; check the credentials in the environment") from error
            if will_pass(error):
                raise ConnectionError(said) from error
            raise OSError(said) from error

    @property
    def _filesystem(self) -> Any:
        return self._open().filesystem

    @property
    def _root(self) -> str:
        return self._open().root

    def _open(self) -> _Opened:
        if self._opened is None or self._opened.pid != os.getpid():
            try:
                filesystem, root = url_to_fs(self.url, **self._kind.options)
            except ImportError as error:
                package = self._kind.package
                raise ConfigError(f"{self.url}: {package} is not installed; pip install {package}") from error
            # By itself s3fs tries five times; see `_S3_CONFIG`.
            filesystem.retries = 1
            self._opened = _Opened(os.getpid(), filesystem, root)
        return self._opened

    def _shown(self, name: str) -> str:
        return redacted(f"{self.url}/{name}")

    def _path(self, name: str) -> str:
        if name.startswith("/") or ".." in PurePosixPath(name).parts:
            raise CheckpointError(f"{name!r} is not a name inside {self.url}")
        inside = str(PurePosixPath(name))
        return self._root if inside == "." else f"{self._root}/{inside}"

    def _name(self, path: str) -> str:
        return path.removeprefix(f"{self._root}/")


@dataclass(frozen=True)
class _Opened:
    """The file system that one process has opened."""

    pid: int
    filesystem: Any
    root: str


class _Call(Protocol):
    def __call__(self, call: Callable[[Any], T], name: str) -> T: ...


@dataclass(frozen=True)
class _StoreKind:
    """Describes how to talk to one kind of store.

    Attributes:
        package: The package that fsspec needs for it.
        options: Options of its file system.
        to_create: Arguments with which `pipe_file` creates an object and never replaces one.
        marks: The argument of `pipe_file` that marks an object with its writer. Without one, a lost answer makes our
            own creation look like another writer's: an error, but never a second winner.
        upload: Writes an object of many chunks: (call, path, name, chunks).
    """

    package: str
    options: dict[str, Any]
    to_create: dict[str, Any]
    marks: str | None
    upload: Callable[[_Call, str, str, Iterable[bytes]], None]


def _upload_to_s3(call: _Call, path: str, name: str, chunks: Iterable[bytes]) -> None:
    """Upload parts, which become an object on completion; an incomplete upload costs money until it is aborted."""
    bucket, _, key = path.partition("/")
    where: dict[str, Any] = {"Bucket": bucket, "Key": key}
    where["UploadId"] = call(lambda fs: fs.call_s3("create_multipart_upload", **where), name)["UploadId"]
    done, total = [], 0
    try:
        for number, chunk in enumerate(chunks, 1):
            part = {**where, "PartNumber": number, "Body": chunk}
            answer = call(lambda fs: fs.call_s3("upload_part", **part), name)  # noqa: B023 called at once
            done.append({"PartNumber": number, "ETag": answer["ETag"]})
            total += len(chunk)
        upload = {"MultipartUpload": {"Parts": done}}
        try:
            call(lambda fs: fs.call_s3("complete_multipart_upload", **where, **upload), name)
        except FileNotFoundError:
            # The upload is gone: it may have been completed, and the answer lost.
            if call(lambda fs: fs.info(path), name)["size"] != total:
                raise
    except BaseException:
        with contextlib.suppress(Exception):
            call(lambda fs: fs.call_s3("abort_multipart_upload", **where), name)
        raise


def _upload_as_file(call: _Call, path: str, name: str, chunks: Iterable[bytes]) -> None:
    file = call(lambda fs: fs.open(path, "wb", block_size=CHUNK_BYTES), name)
    try:
        for chunk in chunks:
            file.write(chunk)
        file.close()
    except BaseException:
        with contextlib.suppress(Exception):
            file.discard()
        file.closed = True  # otherwise its finaliser would complete the partial upload
        raise


_FRESH = {"skip_instance_cache": True, "use_listings_cache": False}
# One try per request, because `retried` tries again.
_S3_CONFIG = {
    "connect_timeout": _CONNECT_LIMIT_S, "read_timeout": _SILENCE_LIMIT_S, "retries": {"total_max_attempts": 1},
}  # fmt: skip
_KINDS = {
    S3: _StoreKind(
        "s3fs",
        {**_FRESH, "max_concurrency": 1, "config_kwargs": _S3_CONFIG},
        {"mode": "create"},  # If-None-Match: *
        "Metadata",
        _upload_to_s3,
    ),
    GOOGLE: _StoreKind("gcsfs", _FRESH, {"mode": "create"}, "metadata", _upload_as_file),  # ifGenerationMatch=0
    AZURE: _StoreKind("adlfs", _FRESH, {"overwrite": False}, None, _upload_as_file),  # If-None-Match: *
}


def _kind_of(url: str) -> _StoreKind:
    scheme = url.partition("://")[0].lower()
    return next(kind for schemes, kind in _KINDS.items() if scheme in schemes)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _chunks(parts: Iterable[bytes | memoryview]) -> Iterator[bytes]:
    buffer = bytearray()
    for part in parts:
        view = memoryview(part)
        rest = view.cast("B") if view.nbytes else view[:0]
        while rest.nbytes:
            taken = min(CHUNK_BYTES - len(buffer), rest.nbytes)
            buffer += rest[:taken]
            rest = rest[taken:]
            if len(buffer) == CHUNK_BYTES:
                yield bytes(buffer)
                buffer.clear()
    if buffer:
        yield bytes(buffer)
