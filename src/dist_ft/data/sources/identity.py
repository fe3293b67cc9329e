"""Hashes of local files, kept: a file whose size and time are as they were is not read again.

Each lies in a small file of its own in the user's cache, written atomically: runs that start at once do not disturb
one another, and a start that is interrupted loses nothing of what it has read.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import xxhash

from dist_ft.layout import FORMAT_VERSION, read_json, user_cache_dir

_BLOCK_BYTES = 1 << 22
_SETTLED_NS = 2_000_000_000
"""A file written so recently can be written again without its time changing: clocks of file systems are coarse."""

Now = Callable[[], int]


def content_identity(path: Path, now_ns: Now = time.time_ns) -> tuple[str, os.stat_result]:
    """Returns `xxh3:` and the hash of a file's bytes, and what the system said of the file.

    Raises:
        OSError: It cannot be read.
    """
    found = path.stat()
    kept = _kept_path(path)
    stamp = {"path": str(path.absolute()), "size": found.st_size, "mtime_ns": found.st_mtime_ns}
    if (identity := _kept_identity(kept, stamp)) is not None:
        return identity, found
    identity = f"xxh3:{_hash_bytes(path)}"
    after = path.stat()
    is_same = (after.st_size, after.st_mtime_ns) == (found.st_size, found.st_mtime_ns)
    if is_same and now_ns() - found.st_mtime_ns > _SETTLED_NS:
        _keep(kept, stamp, identity)
    return identity, found


def _kept_path(path: Path) -> Path:
    name = xxhash.xxh3_128_hexdigest(os.fsencode(path.absolute()))
    return user_cache_dir() / "hashes" / name[:2] / f"{name}.json"


def _kept_identity(kept: Path, stamp: dict[str, object]) -> str | None:
    try:
        found = read_json(kept)
    except (OSError, ValueError):  # never written, or by a later dist-ft: hashed again
        return None
    is_same = all(found.get(key) == value for key, value in stamp.items())
    return str(found["identity"]) if is_same and "identity" in found else None


def _keep(kept: Path, stamp: dict[str, object], identity: str) -> None:
    """Not flushed to disk: what a power cut damages is hashed again."""
    temporary = kept.with_name(f".{kept.name}.{uuid.uuid4().hex[:8]}")
    with suppress(OSError):  # a cache that cannot be written costs time, nothing else
        kept.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({"format_version": FORMAT_VERSION, **stamp, "identity": identity}))
        temporary.replace(kept)
    with suppress(OSError):
        temporary.unlink(missing_ok=True)


def _hash_bytes(path: Path) -> str:
    hasher = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            hasher.update(block)
    return hasher.hexdigest()
