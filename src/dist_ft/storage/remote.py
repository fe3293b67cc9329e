"""Finds files behind URLs, identifies their contents, and reads them by ranges through fsspec, with retries.

Credentials come from the environment, where each client looks for them. The caller interprets the bytes.
"""

from __future__ import annotations

import io
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, BinaryIO, TypeVar, cast

import fsspec
import xxhash
from fsspec.core import url_to_fs
from fsspec.utils import glob_translate

from dist_ft.errors import StorageError
from dist_ft.storage.retry import http_status, is_passing, retried
from dist_ft.storage.urls import is_url, shown_url, without_secrets

BLOCK_BYTES = 4 << 20
"""Bytes that one request reads."""
MAX_TRIES = 7
FIRST_WAIT_S = 0.5
"""Wait before the second try; it doubles before each further one, half a minute in all."""

_GIVE_UP_S = 30.0
"""No further try starts after this time. Clients also wait by themselves, up to a minute when nothing answers."""
_EXTRAS: Mapping[str, str] = {
    "s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure", "abfss": "azure",
}  # fmt: skip
_LOCAL = ("file://", "local://")
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_MAX_DEPTH = 32
"""The most levels of folders that `**` descends."""
_CLIENTS = ("aiohttp", "httpx", "urllib3", "requests", "botocore", "aiobotocore", "google", "azure", "gcsfs")
_CHECKSUMS = ("sha256", "blob_id", "md5Hash", "Content-MD5", "Digest")
"""Keys of a listing that depend on the bytes alone."""
_VERSIONS = (
    "ETag", "etag", "generation", "LastModified", "last_modified", "Last-Modified", "mtime", "updated", "created",
)  # fmt: skip
"""Keys that describe the object, most reliable first; two objects can share a value. A listing has no S3 version."""

T = TypeVar("T")


@dataclass(frozen=True)
class RemoteFile:
    """Describes a file as a listing shows it.

    Attributes:
        address: URL, with the secrets that the user put into it.
        size: Bytes as stored.
        identity: A string that changes when the bytes change.
        has_ranges: Whether a part of it can be read without the rest.
    """

    address: str
    size: int
    identity: str
    has_ranges: bool = True


def is_remote(address: str) -> bool:
    """Return whether an address is read through fsspec; a `file://` address is a path."""
    return is_url(address) and not address.startswith(_LOCAL)


def without_scheme(address: str) -> str:
    """Return the path that a `file://` address names; return any other address unchanged."""
    return next((address.removeprefix(scheme) for scheme in _LOCAL if address.startswith(scheme)), address)


def missing_package(address: str) -> str | None:
    """Return what to install to read a URL, or that nothing can read it; None when it can be read."""
    scheme = address.partition("://")[0].lower()
    if "::" in address:
        return "URLs that are joined by `::` are not read; name the file itself"
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError:
        extra = _EXTRAS.get(scheme)
        install = f"pip install dist-ft[{extra}]" if extra else f"pip install the fsspec package for {scheme}"
        return f"reading {scheme}:// needs a package that is not installed; run `{install}`"
    except ValueError:
        return f"{scheme}:// is no known kind of address; use s3://, gs://, az://, https:// or hf://"
    return None


def find_remote(address: str) -> list[RemoteFile]:
    """Return the files that a URL, a pattern (`*`, `**`, `?`, `[`) or a folder names.

    They are sorted by name; hidden files are left out.

    Raises:
        StorageError: There are no files, access is refused, or the store does not answer.
    """
    fs, path = _open_fs(address)
    fs.invalidate_cache()  # otherwise an old listing would answer
    is_http = address.startswith(("http://", "https://"))
    magic = _first_magic(address, is_http)
    if magic is not None:
        base = address[:magic].rpartition("/")[0]
        base = base + "//" if base.endswith(":/") else base
        rest = address[len(base) :].strip("/")
        found = _walked(fs, base, _MAX_DEPTH if "**" in rest else rest.count("/"))
        pattern = re.compile(glob_translate(path))
        found = {name: entry for name, entry in found.items() if pattern.match(name)}
    elif address.endswith("/") if is_http else _retried(address, lambda: fs.info(path))["type"] == "directory":
        base = address.rstrip("/")
        found = _walked(fs, base, 0)
    else:
        return [stat_remote(address)]
    root = fs._strip_protocol(base)
    addresses = {
        base + name.removeprefix(root): entry
        for name, entry in sorted(found.items())
        if not name.rpartition("/")[2].startswith(".")
    }
    if not addresses:
        raise StorageError(f"{shown_url(address)} matches no files; check the pattern, or name a file")
    if is_http:  # a page of links does not describe the files behind them
        return [stat_remote(each) for each in addresses]
    return [_described(each, entry) for each, entry in addresses.items()]


def stat_remote(address: str) -> RemoteFile:
    """Return the store's current description of one file, without reading it.

    Raises:
        StorageError: The file does not exist, access is refused, or the store does not answer.
    """
    fs, path = _open_fs(address)
    fs.invalidate_cache()
    entry = _retried(address, lambda: fs.info(path))
    if address.startswith(("http://", "https://")):
        return _described(address, entry, _serves_ranges(fs, path, address, entry))
    return _described(address, entry)


def open_remote(file: RemoteFile) -> BinaryIO:
    """Open a file for reading, seekable. A failed request is tried again; memory holds a block or two.

    When the server serves no ranges, the file is first copied into the system's folder for temporary files.

    Raises:
        StorageError: The file cannot be read; can also be raised while reading.
    """
    fs, path = _open_fs(file.address)
    if not file.has_ranges:
        return _retried(file.address, lambda: _fetched(fs, path, file.size))
    return io.BufferedReader(_Ranges(fs, path, file), BLOCK_BYTES)


class _Ranges(io.RawIOBase):
    """Reads a file with one request per read, so that a failed request can be repeated."""

    def __init__(self, fs: Any, path: str, file: RemoteFile) -> None:
        self._fs, self._path, self._file = fs, path, file
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        end = min(self._at + len(buffer), self._file.size)
        if end <= self._at:
            return 0
        data = _retried(self._file.address, lambda: self._range(self._at, end))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def _range(self, start: int, end: int) -> bytes:
        data: bytes = self._fs.cat_file(self._path, start=start, end=end)
        if len(data) != end - start:
            raise ConnectionError(f"{len(data)} bytes came, {end - start} were asked for")
        return data


def _retried(address: str, action: Callable[[], T]) -> T:
    num_tries = 0

    def counted() -> T:
        nonlocal num_tries
        num_tries += 1
        return action()

    try:
        return retried(
            counted, shown_url(address), FIRST_WAIT_S, num_tries=MAX_TRIES, give_up_s=_GIVE_UP_S, may_pass=_may_pass
        )
    except Exception as error:  # each client raises exceptions of its own
        raise StorageError(_explain(address, error, num_tries)) from error


def _may_pass(error: Exception) -> bool:
    """Return whether a further try can help."""
    status = http_status(error)
    if status is not None:
        return is_passing(status)
    if isinstance(error, _FINAL) or "Credential" in type(error).__name__:
        return False
    return isinstance(error, OSError | TimeoutError) or type(error).__module__.startswith(_CLIENTS)


def _explain(address: str, error: Exception, tries: int) -> str:
    status = http_status(error)
    said = shown_url(" ".join(str(error).split()) or type(error).__name__)[:200]
    if isinstance(error, FileNotFoundError) or status == 404:
        return f"{shown_url(address)}: no such file or folder"
    if isinstance(error, PermissionError) or status in (401, 403) or "Credential" in type(error).__name__:
        return (
            f"{shown_url(address)}: access is refused ({said}); set the credentials of this store in the environment "
            "of all machines"
        )
    return f"{shown_url(address)} cannot be read after {tries} {'try' if tries == 1 else 'tries'}: {said}"


def _open_fs(address: str) -> tuple[Any, str]:
    if problem := missing_package(address):
        raise StorageError(f"{shown_url(address)}: {problem}")
    return cast("tuple[Any, str]", _retried(address, lambda: url_to_fs(address)))


def _walked(fs: Any, base: str, depth: int) -> dict[str, Any]:
    """Return the files below a folder by name. fsspec's own walk treats a failed listing as an empty folder."""
    root = fs._strip_protocol(base)
    files: dict[str, Any] = {}
    for entry in _retried(base, lambda: fs.ls(root, detail=True)):
        name = entry["name"].rstrip("/")
        if entry["type"] == "file":
            files[name] = entry
        elif depth > 0 and name.startswith(f"{root}/"):  # a page of links leads anywhere
            files |= _walked(fs, base + name.removeprefix(root), depth - 1)
    return files


def _first_magic(address: str, is_http: bool) -> int | None:
    marks = "*[" if is_http else "*[?"
    end = address.find("?") if is_http and "?" in address else len(address)
    return min((at for mark in marks if (at := address.find(mark, 0, end)) >= 0), default=None)


def _described(address: str, entry: Mapping[str, Any], has_ranges: bool = True) -> RemoteFile:
    if entry.get("size") is None:
        raise StorageError(f"{shown_url(address)}: the server does not say how large it is; download it, name the copy")
    return RemoteFile(address, int(entry["size"]), _identity(address, entry), has_ranges)


def _identity(address: str, entry: Mapping[str, Any]) -> str:
    """Return the checksum of the bytes if the listing has one, else the object's version with its name."""
    known: dict[str, Any] = {**entry, **(entry.get("lfs") or {})}
    size = known["size"]
    if checksum := _first(known, _CHECKSUMS):
        return f"{checksum}:{size}"
    name = xxhash.xxh3_64_hexdigest(without_secrets(address).encode())
    return f"{_first(known, _VERSIONS) or 'unversioned'}:{size}:{name}"


def _first(known: Mapping[str, Any], names: Sequence[str]) -> str | None:
    return next((f"{name.lower()}:{_plain(known[name])}" for name in names if known.get(name)), None)


def _plain(value: Any) -> str:
    """Return a value in one spelling, because a listing may have a date where a single look has seconds."""
    return str(value.timestamp() if isinstance(value, datetime) else value).strip('"').replace(" ", "_")


def _serves_ranges(fs: Any, path: str, address: str, entry: Mapping[str, Any]) -> bool:
    if not entry.get("size") or entry.get("partial") is False:
        return False

    def read_one() -> bool:
        with fs.open(path, "rb", cache_type="none", size=entry["size"]) as opened:
            opened.seek(1)
            try:
                return len(opened.read(1)) == 1
            except ValueError:  # fsspec raises this when the answer is the whole file
                return False

    return _retried(address, read_one)


def _fetched(fs: Any, path: str, size: int) -> BinaryIO:
    copy = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
    with fs.open(path, "rb", block_size=0) as opened:
        while block := opened.read(BLOCK_BYTES):
            copy.write(block)
    if copy.tell() != size:
        raise ConnectionError(f"{copy.tell()} bytes came, {size} were asked for")
    copy.seek(0)
    return cast("BinaryIO", copy)
