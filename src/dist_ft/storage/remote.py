"""Files behind URLs, read through fsspec: found, told apart, and read by ranges with further tries.

Credentials come from the environment, as each client looks for them. What the bytes mean is the caller's.
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
"""What one request reads."""
MAX_TRIES = 7
FIRST_WAIT_S = 0.5
"""Wait before the second try; doubled before each further one, half a minute in all."""

_GIVE_UP_S = 30.0
"""No further try after so long: clients have waits of their own, of a minute where nobody answers."""
_EXTRAS: Mapping[str, str] = {
    "s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure", "abfss": "azure",
}  # fmt: skip
_LOCAL = ("file://", "local://")
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_MAX_DEPTH = 32
"""Folders that `**` goes down at most."""
_CLIENTS = ("aiohttp", "httpx", "urllib3", "requests", "botocore", "aiobotocore", "google", "azure", "gcsfs")
_CHECKSUMS = ("sha256", "blob_id", "md5Hash", "Content-MD5", "Digest")
"""What a listing says of the bytes alone."""
_VERSIONS = (
    "ETag", "etag", "generation", "LastModified", "last_modified", "Last-Modified", "mtime", "updated", "created",
)  # fmt: skip
"""What it says of this object, surest first; two objects can have the same one. A listing has no S3 version."""

T = TypeVar("T")


@dataclass(frozen=True)
class RemoteFile:
    """A file as a listing has it.

    Attributes:
        address: URL, with whatever secrets it was named with.
        size: Bytes as stored.
        identity: Another one when the bytes are others.
        has_ranges: Whether a part of it can be read without the rest.
    """

    address: str
    size: int
    identity: str
    has_ranges: bool = True


def is_remote(address: str) -> bool:
    """Whether an address is read through fsspec; `file://` is a path."""
    return is_url(address) and not address.startswith(_LOCAL)


def without_scheme(address: str) -> str:
    """Returns the path that a `file://` address names; any other address as it is."""
    return next((address.removeprefix(scheme) for scheme in _LOCAL if address.startswith(scheme)), address)


def missing_package(address: str) -> str | None:
    """Says what is to be installed to read a URL, or that nothing can; None when it can be read."""
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
    """Returns the files that a URL, a pattern (`*`, `**`, `?`, `[`) or a folder names, by name, without hidden ones.

    Raises:
        StorageError: There are none, they are refused, or the store does not answer.
    """
    fs, path = _open_fs(address)
    fs.invalidate_cache()  # or a listing of long ago would answer
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
    if is_http:  # a page of links says nothing of what they lead to
        return [stat_remote(each) for each in addresses]
    return [_described(each, entry) for each, entry in addresses.items()]


def stat_remote(address: str) -> RemoteFile:
    """Returns what a store says of one file now, without reading it.

    Raises:
        StorageError: It is not there, is refused, or the store does not answer.
    """
    fs, path = _open_fs(address)
    fs.invalidate_cache()
    entry = _retried(address, lambda: fs.info(path))
    if address.startswith(("http://", "https://")):
        return _described(address, entry, _serves_ranges(fs, path, address, entry))
    return _described(address, entry)


def open_remote(file: RemoteFile) -> BinaryIO:
    """Opens a file for reading, seekable. A failed request is tried again; memory holds a block or two.

    A file of a server that serves no ranges is fetched into the system's folder for temporary files first.

    Raises:
        StorageError: It cannot be read; also while reading.
    """
    fs, path = _open_fs(file.address)
    if not file.has_ranges:
        return _retried(file.address, lambda: _fetched(fs, path, file.size))
    return io.BufferedReader(_Ranges(fs, path, file), BLOCK_BYTES)


class _Ranges(io.RawIOBase):
    """A file whose every read is a request of its own, so that one can be made again."""

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
    except Exception as error:  # what a client raises is its own affair
        raise StorageError(_explain(address, error, num_tries)) from error


def _may_pass(error: Exception) -> bool:
    """Whether a further try can help."""
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
    """Returns the files below a folder by name. fsspec's own walk takes a listing that fails for an empty one."""
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
    """Returns a checksum of the bytes where the listing has one, else what it says of the object of this name."""
    known: dict[str, Any] = {**entry, **(entry.get("lfs") or {})}
    size = known["size"]
    if checksum := _first(known, _CHECKSUMS):
        return f"{checksum}:{size}"
    name = xxhash.xxh3_64_hexdigest(without_secrets(address).encode())
    return f"{_first(known, _VERSIONS) or 'unversioned'}:{size}:{name}"


def _first(known: Mapping[str, Any], names: Sequence[str]) -> str | None:
    return next((f"{name.lower()}:{_plain(known[name])}" for name in names if known.get(name)), None)


def _plain(value: Any) -> str:
    """Returns a value spelled the same from a listing and a single look: one may have a date, the other seconds."""
    return str(value.timestamp() if isinstance(value, datetime) else value).strip('"').replace(" ", "_")


def _serves_ranges(fs: Any, path: str, address: str, entry: Mapping[str, Any]) -> bool:
    if not entry.get("size") or entry.get("partial") is False:
        return False

    def read_one() -> bool:
        with fs.open(path, "rb", cache_type="none", size=entry["size"]) as opened:
            opened.seek(1)
            try:
                return len(opened.read(1)) == 1
            except ValueError:  # fsspec's word for an answer that is the whole file
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
