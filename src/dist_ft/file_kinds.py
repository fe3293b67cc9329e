"""Kinds of data files, told by their endings: the one table that the checks of a config and all readers use.

A new kind is a row here and its reader in `data/sources/readers.py`. Also recognises what Git LFS and git-annex leave
in place of a file that was not fetched.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

COMPRESSIONS: Mapping[str, str] = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}
"""Endings behind that of a text file, and the compression that each means."""


@dataclass(frozen=True)
class FileKind:
    """One kind of data file.

    Attributes:
        name: What messages call it; part of the keys of token shards.
        endings: Endings of its file names, in small letters.
        is_text: Whether a file may be compressed as a whole; binary kinds compress inside.
    """

    name: str
    endings: tuple[str, ...]
    is_text: bool = True


FILE_KINDS = (
    FileKind("jsonl", (".jsonl", ".ndjson")),
    FileKind("json", (".json",)),
    FileKind("csv", (".csv",)),
    FileKind("tsv", (".tsv",)),
    FileKind("parquet", (".parquet",), is_text=False),
    FileKind("arrow", (".arrow", ".feather"), is_text=False),
    FileKind("text", (".txt",)),
)
ENDINGS: Mapping[str, FileKind] = {ending: kind for kind in FILE_KINDS for ending in kind.endings}
_ENDING = re.compile(
    rf"({'|'.join(map(re.escape, ENDINGS))})({'|'.join(map(re.escape, COMPRESSIONS))})?$", re.IGNORECASE
)


def has_known_ending(name: str) -> bool:
    """Return whether a name ends as a data file does."""
    return _ENDING.search(name) is not None


MAX_POINTER_BYTES = 1023
"""Largest pointer. The specification of Git LFS sets the limit, and pointers of git-annex are smaller."""

_STARTS = {
    b"version https://git-lfs.github.com/spec/": "a pointer of Git LFS",
    b"version https://hawser.github.com/spec/": "a pointer of Git LFS",
    b"/annex/objects/": "a pointer of git-annex",
}
_FETCH = {"a pointer of Git LFS": "git lfs pull", "a pointer of git-annex": "git annex get ."}


def describe_pointer(content: bytes) -> str | None:
    """Return what a small file is if it is a pointer, and how to get the file itself; None for any other file."""
    for start, what in _STARTS.items():
        if content.startswith(start):
            return (
                f"{what}, not the file itself; fetch it (`{_FETCH[what]}` in its repository) or copy it from elsewhere"
            )
    return None
