"""Defines the store of a run's checkpoints: a few operations on named objects, with exclusive creation.

Fencing rests on `create_exclusive`: of two writers of one name, one wins and the other is told. A store that
cannot do this is refused. This module has local and shared file systems; `objects.py` has the object stores.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

from dist_ft.errors import CheckpointError
from dist_ft.storage.publish import beside, create_exclusive, sync_directory, written_beside

PART_BYTES = 8 * 2**20
"""Bytes of a file that are held in memory while it is copied."""


class Store(Protocol):
    """Named byte strings below a root. Names are relative and use `/`."""

    def create_exclusive(self, name: str, data: bytes) -> bool:
        """Create a whole object durably; return False and change nothing when the name exists."""
        ...

    def put(self, name: str, parts: Iterable[bytes | memoryview]) -> None:
        """Write an object durably from parts and replace an old one; readers only ever see a whole object."""
        ...

    def read(self, name: str) -> bytes:
        """Return an object. Raises FileNotFoundError."""
        ...

    def read_range(self, name: str, start: int, count: int) -> bytes:
        """Return `count` bytes from `start`. Raises FileNotFoundError, or CheckpointError when bytes are missing."""
        ...

    def size(self, name: str) -> int:
        """Return the size of an object in bytes. Raises FileNotFoundError."""
        ...

    def names(self, prefix: str) -> list[str]:
        """Return the sorted names of the objects below a folder; empty when the folder does not exist."""
        ...

    def folders(self, prefix: str) -> list[str]:
        """Return the sorted names of the folders in a folder, including hidden and empty ones."""
        ...

    def delete(self, prefix: str) -> None:
        """Delete an object, or everything below a folder; do nothing when there is none."""
        ...


class LocalStore:
    """A directory on a local or shared file system."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def create_exclusive(self, name: str, data: bytes) -> bool:
        """See `Store`."""
        return create_exclusive(self._path(name), data)

    def put(self, name: str, parts: Iterable[bytes | memoryview]) -> None:
        """See `Store`."""
        path = self._path(name)
        with written_beside(path, parts) as temporary:
            temporary.replace(path)
        sync_directory(path.parent)

    def read(self, name: str) -> bytes:
        """See `Store`."""
        with self._open(name) as file:
            return file.read()

    def read_range(self, name: str, start: int, count: int) -> bytes:
        """See `Store`."""
        with self._open(name) as file:
            data = os.pread(file.fileno(), count, start)
            # One call reads 2 GiB at most, and may read less.
            while len(data) < count and (part := os.pread(file.fileno(), count - len(data), start + len(data))):
                data += part
        if len(data) != count:
            raise CheckpointError(f"{self._path(name)} ends at byte {start + len(data)}, expected {start + count}")
        return data

    def size(self, name: str) -> int:
        """See `Store`."""
        return self._path(name).lstat().st_size

    def names(self, prefix: str) -> list[str]:
        """See `Store`."""
        base = self._path(prefix)
        found = []
        # Unlike rglob, os.walk tolerates folders that retention deletes meanwhile.
        for folder, folders, files in os.walk(base, onerror=_raise_unless_gone):
            folders[:] = [name for name in folders if not name.startswith(".")]
            here = Path(folder).relative_to(self.root)
            found += [(here / name).as_posix() for name in files if not name.startswith(".")]
        return sorted(found)

    def folders(self, prefix: str) -> list[str]:
        """See `Store`."""
        base = self._path(prefix)
        if not base.is_dir():
            return []
        return sorted(f"{prefix}/{entry.name}" for entry in os.scandir(base) if entry.is_dir(follow_symlinks=False))

    def delete(self, prefix: str) -> None:
        """See `Store`. Renames a folder before deleting it, so that nobody sees it half deleted."""
        base = self._path(prefix)
        if base == self._path(""):
            raise CheckpointError(f"{prefix!r} is the whole of {self.root}; name a folder in it")
        if base.name.startswith(".deleted-"):
            shutil.rmtree(base)
        elif base.is_file():
            base.unlink(missing_ok=True)
        elif base.exists():
            doomed = base.with_name(f".deleted-{beside(base).name[1:]}")
            base.rename(doomed)
            shutil.rmtree(doomed)

    def _open(self, name: str) -> BinaryIO:
        """Open a file for reading; refuse a link, because it could lead anywhere."""
        path = self._path(name)
        try:
            return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb")
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise CheckpointError(f"{path} is a link, expected a file") from error
            raise

    def _path(self, name: str) -> Path:
        path = self.root / name
        if name.startswith("/") or ".." in Path(name).parts:
            raise CheckpointError(f"{name!r} is not a name inside {self.root}")
        return path


def _raise_unless_gone(error: OSError) -> None:
    """Raise the error of a failed listing, which must not look empty: attempts and checkpoints would seem lost."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def file_parts(path: Path) -> Iterator[bytes]:
    """Yield a file in pieces."""
    with path.open("rb") as file:
        while part := file.read(PART_BYTES):
            yield part
