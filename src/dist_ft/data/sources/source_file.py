"""Describes one file of a source (address, kind, identity of its bytes) and opens it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from dist_ft.config.paths import EMBEDDED_PREFIX
from dist_ft.errors import DataError
from dist_ft.file_kinds import COMPRESSIONS, ENDINGS
from dist_ft.printable import printable
from dist_ft.storage.remote import RemoteFile, is_remote, open_remote
from dist_ft.storage.urls import shown_url, without_secrets

EMBEDDED = "embedded"
"""Kind of a data set that is generated, not read."""

_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class SourceFile:
    """Describes a file at the time of its listing.

    Attributes:
        address: Path, URL, or the name of an embedded data set.
        kind: Name of a `FileKind`, or `embedded`.
        compression: A value of `COMPRESSIONS`, or None.
        size: Bytes as stored.
        identity: `xxh3:…` of the bytes of a local file; for a remote file, see `storage/remote.py`.
        modified_ns: Time of the last write to a local file. Only a hint that its bytes are still the same.
        has_ranges: Whether a part can be read without the rest.
    """

    address: str
    kind: str
    compression: str | None
    size: int
    identity: str
    modified_ns: int | None = None
    has_ranges: bool = True

    @property
    def is_remote(self) -> bool:
        """Whether the file is read through its URL."""
        return is_remote(self.address)

    @property
    def shown(self) -> str:
        """The address without its secrets, safe for a terminal."""
        return shown_url(self.address) if self.is_remote else printable(self.address)

    def open(self) -> BinaryIO:
        """Open the stored bytes, seekable.

        Raises:
            OSError, StorageError: The bytes cannot be read; a remote file can also raise it while being read.
        """
        if self.is_remote:
            return open_remote(RemoteFile(self.address, self.size, self.identity, self.has_ranges))
        return Path(self.address).open("rb", buffering=_BUFFER_BYTES)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values for the run directory, without secrets of URLs."""
        return asdict(self) | {"address": without_secrets(self.address)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SourceFile:
        """Inverse of `to_dict`, except for secrets; extra keys are ignored."""
        return cls(**{name: data[name] for name in cls.__dataclass_fields__})


def kind_of(address: str) -> tuple[str, str | None]:
    """Return the kind and the compression of a file by its name.

    Raises:
        DataError: The name has no known ending.
    """
    if address.startswith(EMBEDDED_PREFIX):
        return EMBEDDED, None
    name = Path(address.partition("?")[0] if is_remote(address) else address)
    compression = COMPRESSIONS.get(name.suffix.lower())
    kind = ENDINGS.get((name.with_suffix("") if compression else name).suffix.lower())
    if kind is None or (compression and not kind.is_text):
        raise DataError(
            f"{shown_url(address)}: unknown kind of file; known endings are {', '.join(ENDINGS)}, "
            f"and {', '.join(COMPRESSIONS)} behind those of text"
        )
    return kind.name, compression
