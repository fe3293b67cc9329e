"""One file of a source: what it is called, what kind it is, and which bytes it has; opened where it lies."""

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
"""Kind of a data set that is made and not read."""

_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class SourceFile:
    """A file as it was when it was listed.

    Attributes:
        address: Path, URL, or the name of an embedded data set.
        kind: Name of a `FileKind`, or `embedded`.
        compression: A value of `COMPRESSIONS`, or None.
        size: Bytes as stored.
        identity: `xxh3:…` of the bytes of a local file; what a store says of a remote one (`storage/remote.py`).
        modified_ns: When a local file was last written to. Only a hint that its bytes are still the same.
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
        """Whether it is read through its URL."""
        return is_remote(self.address)

    @property
    def shown(self) -> str:
        """The address without its secrets, safe for a terminal."""
        return shown_url(self.address) if self.is_remote else printable(self.address)

    def open(self) -> BinaryIO:
        """Opens the stored bytes, seekable.

        Raises:
            OSError, StorageError: They cannot be read; a remote file can also raise it while it is read.
        """
        if self.is_remote:
            return open_remote(RemoteFile(self.address, self.size, self.identity, self.has_ranges))
        return Path(self.address).open("rb", buffering=_BUFFER_BYTES)

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON values for the run directory, which no secret of a URL reaches."""
        return asdict(self) | {"address": without_secrets(self.address)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SourceFile:
        """Inverse of `to_dict`, secrets aside; extra keys ignored."""
        return cls(**{name: data[name] for name in cls.__dataclass_fields__})


def kind_of(address: str) -> tuple[str, str | None]:
    """Returns kind and compression, as the name of a file tells them.

    Raises:
        DataError: It has no known ending.
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
