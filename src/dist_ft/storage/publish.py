"""Files and directories that are whole when they have their name: the one place that writes beside and renames.

What a writer leaves that dies half way is hidden (`.name.1a2b3c4d`) and read by nobody. Torch-free.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from dist_ft.layout import FORMAT_VERSION


def beside(path: Path) -> Path:
    """Return a hidden name in the same folder, that nobody else has."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")


@contextmanager
def written_beside(path: Path, parts: Iterable[bytes | memoryview], is_durable: bool = True) -> Iterator[Path]:
    """Give a file beside `path` with these bytes, to be put in its place; what is left of it goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(path)
    try:
        with temporary.open("wb") as file:
            for part in parts:
                file.write(part)
            if is_durable:
                file.flush()
                os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, text: str, is_durable: bool = True) -> None:
    """Replace a file: readers see the old or the new one.

    Args:
        path: The file; its folder is made.
        text: What it holds.
        is_durable: Whether this also holds after a power cut, which costs a flush of the disk.
    """
    with written_beside(path, [text.encode()], is_durable) as temporary:
        temporary.replace(path)


def write_json(path: Path, data: dict[str, Any], is_durable: bool = True) -> None:
    """Replace a JSON file with a `format_version`, as `write_whole` does."""
    write_whole(path, json.dumps({"format_version": FORMAT_VERSION, **data}, indent=1) + "\n", is_durable)


def read_json(path: Path) -> dict[str, Any]:
    """Read a file written by `write_json`.

    Raises:
        FileNotFoundError: It does not exist.
        ValueError: It is not such a file, or of a later format.
    """
    data = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, dict) or data.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{path}: expected format_version {FORMAT_VERSION}; use the dist-ft that wrote it")
    return data


def create_exclusive(path: Path, data: bytes) -> bool:
    """Create a file durably; return False, changing nothing, when the name exists.

    A hard link publishes the finished file, so a reader never sees half of it.
    """
    with written_beside(path, [data]) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            # NFS may have lost the answer to a link that was made, and asked again.
            if not path.samefile(temporary):
                return False
    sync_directory(path.parent)
    sync_directory(path.parent.parent)  # the folder itself may be new
    return True


def replace_link(link: Path, target: str) -> None:
    """Points a link at `target`; readers see either the old or the new target."""
    temporary = beside(link)
    temporary.symlink_to(target)
    temporary.replace(link)


@contextmanager
def new_directory(directory: Path) -> Iterator[Path]:
    """Yield a hidden directory that gets its name when the block succeeds, and is removed otherwise."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    hidden = beside(directory)
    hidden.mkdir()
    try:
        yield hidden
        for file in hidden.rglob("*"):
            sync_directory(file)  # or a power cut may keep the new name and lose what is in the files
        hidden.rename(directory)
        sync_directory(directory.parent)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def make_once(directory: Path, make: Callable[[Path], None]) -> Path:
    """Return a directory, made by whoever asks first; the others wait.

    Args:
        directory: The directory; it is whole when it exists.
        make: Makes the directory that it is given, and plain files in it.
    """
    if directory.is_dir():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{directory}.lock"):
        if directory.is_dir():
            return directory
        for left in directory.parent.glob(f".{directory.name}.*"):  # of a maker that died: it has the lock no more
            shutil.rmtree(left, ignore_errors=True)
        hidden = beside(directory)
        try:
            make(hidden)
            for file in hidden.iterdir():
                sync_directory(file)  # or a power cut may keep the new name and lose what is in the files
            hidden.rename(directory)
        finally:
            shutil.rmtree(hidden, ignore_errors=True)
    return directory


def sync_directory(path: Path) -> None:
    """Make what is in a directory, or a file, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
