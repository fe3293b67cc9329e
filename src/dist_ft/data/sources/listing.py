"""Lists the files of a source with an identity of their bytes, and checks that the files have not changed.

The list is made when a run begins, and frozen: later, a file that changes, vanishes or appears is an error that names
the file. `hub_files.py` and, for URLs, `storage/remote.py` find the files. The user's cache keeps the hashes of local
files, so that a file whose size and time have not changed is not read again.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import xxhash

from dist_ft.config.data_sections import DataConfig, RowSource
from dist_ft.config.paths import EMBEDDED_PREFIX, is_pattern
from dist_ft.data.sources.generated import embedded_rows
from dist_ft.data.sources.hub_files import find_files
from dist_ft.data.sources.readers import cannot_read, refuse_pointer
from dist_ft.data.sources.source_file import EMBEDDED, SourceFile, kind_of
from dist_ft.errors import DataError, StorageError
from dist_ft.layout import user_cache_dir
from dist_ft.printable import printable
from dist_ft.storage.publish import read_json, write_json
from dist_ft.storage.remote import find_remote, is_remote, stat_remote
from dist_ft.storage.urls import shown_url, without_secrets

_SHARD = re.compile(r"-(\d{5})-of-(\d{5})")
_THREADS = 8
"""Files hashed at once; one reader alone does not use the full speed of a network file system."""
_WAY_OUT = "put back what was there, or start another run (run.name) with the data as it is now"


def list_files(source: RowSource) -> list[SourceFile]:
    """Return the files of a source, in the order in which they are read.

    Local files are read once to be hashed, and again only when they change. Of remote files, only the listing is read.

    Raises:
        DataError: There are no files, they are of several kinds, or they cannot be read.
    """
    if source.source.startswith(EMBEDDED_PREFIX):
        return [_embedded(source.source)]
    try:
        files = _remote_files(source) if is_remote(source.source) else _local_files(source)
    except StorageError as error:
        raise DataError(str(error)) from error
    is_one = len(files) == 1 and Path(source.source).name == Path(files[0].address).name
    if not is_one and not is_pattern(source.source):  # otherwise the source names exactly these files
        _check_shards(source, files)
    if kinds := sorted({file.kind for file in files[1:]} - {files[0].kind}):
        raise DataError(
            f"{shown_url(source.source)} holds {files[0].kind} and {', '.join(kinds)} files; "
            "keep one kind in a folder, or name the files as sources of their own"
        )
    return files


@dataclass(frozen=True)
class ListedSources:
    """Holds the files of a run's sources, listed once for all readers.

    Attributes:
        train: Files of each training source.
        held_out: Files of each source that `data.eval` names.
    """

    train: tuple[tuple[SourceFile, ...], ...]
    held_out: tuple[tuple[SourceFile, ...], ...] = ()


def list_sources(data: DataConfig) -> ListedSources:
    """List all sources of a run.

    Raises:
        DataError: See `list_files`.
    """
    train = tuple(tuple(list_files(source)) for source in data.train)
    return ListedSources(train, tuple(tuple(list_files(source)) for source in data.eval_sources.values()))


def check_frozen(frozen: Sequence[SourceFile], now: Sequence[SourceFile]) -> None:
    """Check that a source has not changed since the run began. Pure.

    Args:
        frozen: Files of the source at the start of the run; secrets of their URLs may be missing.
        now: Files of the source now.

    Raises:
        DataError: A file changed, vanished or appeared; the message names the first one.
    """
    before = {without_secrets(file.address): file for file in frozen}
    after = {without_secrets(file.address): file for file in now}
    for address, file in before.items():
        if address not in after:
            raise DataError(f"{file.shown} is gone; it had {_said(file)} when the run began; {_WAY_OUT}")
        new = after[address]
        if (file.size, file.identity, file.kind, file.compression) != (
            new.size, new.identity, new.kind, new.compression,
        ):  # fmt: skip
            raise DataError(_changed(file, new.size, new.identity))
    for address, file in after.items():
        if address not in before:
            raise DataError(
                f"{file.shown} ({_said(file)}) was not there when the run began; move it out of the source, or start "
                "another run (run.name) with it"
            )
    if list(before) != list(after):
        raise DataError(
            f"the {len(frozen)} files of a source come in another order than when the run began; {_WAY_OUT}"
        )


def check_unchanged(file: SourceFile) -> None:
    """Check that a file has not changed since it was listed. Looks only at its entry, unless it was written to.

    Raises:
        DataError: The file changed, or cannot be found.
    """
    if file.kind == EMBEDDED:
        return
    try:
        if file.is_remote:
            remote = stat_remote(file.address)
            size, identity = remote.size, remote.identity
        else:
            path = Path(file.address)
            found = path.stat()
            is_settled = (found.st_size, found.st_mtime_ns) == (file.size, file.modified_ns)
            size, identity = found.st_size, file.identity if is_settled else content_identity(path)[0]
    except StorageError as error:
        raise DataError(f"{error}; it had {_said(file)} when the run began") from error
    except OSError as error:
        raise DataError(f"{cannot_read(file.shown, error)}; it had {_said(file)} when the run began") from error
    if (size, identity) != (file.size, file.identity):
        raise DataError(_changed(file, size, identity))


def _embedded(address: str) -> SourceFile:
    content = json.dumps(embedded_rows(address.removeprefix(EMBEDDED_PREFIX))).encode()
    return SourceFile(address, EMBEDDED, None, len(content), f"xxh3:{xxhash.xxh3_128_hexdigest(content)}")


def _remote_files(source: RowSource) -> list[SourceFile]:
    found = find_remote(source.source)
    return [
        SourceFile(file.address, *kind_of(file.address), file.size, file.identity, has_ranges=file.has_ranges)
        for file in found
    ]


def _local_files(source: RowSource) -> list[SourceFile]:
    paths = find_files(source)
    kinds = [kind_of(str(path)) for path in paths]  # before the first of them is read
    with ThreadPoolExecutor(_THREADS) as pool:
        files = list(pool.map(_local_file, paths, kinds))
    for file in files:
        refuse_pointer(file)
    return files


def _local_file(path: Path, kind: tuple[str, str | None]) -> SourceFile:
    try:
        identity, found = content_identity(path)
    except OSError as error:
        raise DataError(cannot_read(shown_url(str(path)), error)) from error
    return SourceFile(str(path), *kind, found.st_size, identity, found.st_mtime_ns)


def _check_shards(source: RowSource, files: Sequence[SourceFile]) -> None:
    """Refuses a folder or data set in which a shard is missing; the names of shards tell how many there must be."""
    numbers: dict[tuple[str, int], set[int]] = {}
    for file in files:
        if match := _SHARD.search(name := Path(file.address).name):
            numbers.setdefault((name[: match.start()], int(match[2])), set()).add(int(match[1]))
    for (stem, count), found in numbers.items():
        if missing := sorted(set(range(count)) - found):
            raise DataError(
                f"{shown_url(source.source)}: {printable(stem)} has {len(found)} of {count} shards, "
                f"number {missing[0]} is missing; fetch the rest"
            )


def _changed(file: SourceFile, size: int, identity: str) -> str:
    now = f"{size:,} bytes ({identity})"
    return f"{file.shown} has changed since the run began: it had {_said(file)}, now {now}; {_WAY_OUT}"


def _said(file: SourceFile) -> str:
    return f"{file.size:,} bytes ({file.identity})"


_BLOCK_BYTES = 1 << 22
_SETTLED_NS = 2_000_000_000
"""Age below which a modification time is not trusted: clocks of file systems are coarse, so that a file can be
written again without a new time."""

Now = Callable[[], int]


def content_identity(path: Path, now_ns: Now = time.time_ns) -> tuple[str, os.stat_result]:
    """Return `xxh3:` with the hash of a file's bytes, and the file's stat result.

    Raises:
        OSError: The file cannot be read.
    """
    found = path.stat()
    name = xxhash.xxh3_128_hexdigest(os.fsencode(path.absolute()))
    kept = user_cache_dir() / "hashes" / name[:2] / f"{name}.json"
    stamp = {"path": str(path.absolute()), "size": found.st_size, "mtime_ns": found.st_mtime_ns}
    with suppress(OSError, ValueError):  # never written, or written by a later dist-ft: hash again
        before = read_json(kept)
        if "identity" in before and all(before.get(key) == value for key, value in stamp.items()):
            return str(before["identity"]), found
    identity = f"xxh3:{_hash_bytes(path)}"
    after = path.stat()
    is_same = (after.st_size, after.st_mtime_ns) == (found.st_size, found.st_mtime_ns)
    if is_same and now_ns() - found.st_mtime_ns > _SETTLED_NS:
        with suppress(OSError):  # a cache that cannot be written, or that a power cut damages, only costs time
            write_json(kept, {**stamp, "identity": identity}, is_durable=False)
    return identity, found


def _hash_bytes(path: Path) -> str:
    hasher = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            hasher.update(block)
    return hasher.hexdigest()
