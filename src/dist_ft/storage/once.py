"""Directories that are made once a node: under a lock, whole or not at all. Torch-free."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


def make_once(directory: Path, make: Callable[[Path], None]) -> Path:
    """Returns a directory, made by whoever asks first; the others wait.

    Made under another name that is given up when the maker fails or dies, then renamed.

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
        scratch = directory.with_name(f".{directory.name}.{uuid.uuid4().hex[:8]}")
        try:
            make(scratch)
            for file in scratch.iterdir():
                _flush(file)  # or a power cut may keep the new name and lose what is in the files
            scratch.rename(directory)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return directory


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
