"""Kinds of data files, told by their endings: the one table that the checks of a config and all readers use.

A new kind is a row here and its reader in `data/sources/readers.py`.
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
    """Returns whether a name ends as a data file does."""
    return _ENDING.search(name) is not None
