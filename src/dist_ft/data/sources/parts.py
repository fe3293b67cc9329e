"""Cuts source files into parts of about `PART_BYTES`. One task prepares a part, which becomes one token shard.

Large JSONL files are cut at byte offsets, without reading them; Parquet and Arrow files at row groups and record
batches. Other kinds and compressed files stay whole. Small neighbours share a part. The same files always give the
same parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import pyarrow as pa
import xxhash

from dist_ft.data.sources.readers import READERS, cannot_read
from dist_ft.data.sources.source_file import SourceFile
from dist_ft.errors import DataError, StorageError

PART_BYTES = 32 << 20
"""Stored bytes of a part. The value affects where sequences end, so another value gives other token shards."""
_THREADS = 8
"""Footers read at once."""


@dataclass(frozen=True)
class Piece:
    """A range of a file.

    Attributes:
        file: The file.
        start: First byte (JSONL), row group (Parquet) or record batch (Arrow).
        stop: One more than the last; None means the end of the file. A line belongs to the piece in which it starts.
        size: Stored bytes, approximately.
    """

    file: SourceFile
    start: int
    stop: int | None
    size: int


@dataclass(frozen=True)
class Part:
    """The pieces of files that become one token shard.

    Attributes:
        pieces: Pieces in reading order.
    """

    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """Stored bytes, approximately."""
        return sum(piece.size for piece in self.pieces)

    @property
    def shown(self) -> str:
        """The names of its files, for messages."""
        first, *rest = self.pieces
        end = "end" if first.stop is None else first.stop
        text = (
            first.file.shown if (first.start, first.stop) == (0, None) else f"{first.file.shown}[{first.start}:{end}]"
        )
        return f"{text} and {len(rest)} more" if rest else text

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON values for the process that prepares the part. Do not store them: URLs keep their secrets."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Part:
        """Inverse of `to_dict`."""
        return cls(tuple(Piece(**{**piece, "file": SourceFile.from_dict(piece["file"])}) for piece in data["pieces"]))

    def identity(self) -> str:
        """Returns a hash of its bytes and of how they are read, independent of file names."""
        said = [(p.file.kind, p.file.compression, p.file.identity, p.start, p.stop) for p in self.pieces]
        return xxhash.xxh3_128_hexdigest(f"{said}".encode())


def cut_parts(files: Sequence[SourceFile], part_bytes: int = PART_BYTES) -> list[Part]:
    """Returns the parts of a source.

    Args:
        files: Files of one source, in order.
        part_bytes: Target size; a file or row group that cannot be cut may be larger.

    Raises:
        DataError: The footer of a file cannot be read.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        cut = list(pool.map(partial(_cut, part_bytes=part_bytes), files))
    parts: list[Part] = []
    members: list[Piece] = []
    size = 0
    for piece in (piece for pieces in cut for piece in pieces):  # neighbours that fit together share a part
        if members and size + piece.size > part_bytes:
            parts.append(Part(tuple(members)))
            members, size = [], 0
        members.append(piece)
        size += piece.size
    return [*parts, Part(tuple(members))] if members else parts


def whole(files: Sequence[SourceFile]) -> Part:
    """Returns all files of a source as one part."""
    return Part(tuple(Piece(file, 0, None, file.size) for file in files))


def _cut(file: SourceFile, part_bytes: int) -> list[Piece]:
    whole = [Piece(file, 0, None, file.size)]
    if file.size <= part_bytes or file.compression or not file.has_ranges:
        return whole
    reader = READERS[file.kind]
    if reader.is_cut_at_bytes:
        count = -(-file.size // part_bytes)
        edges = [number * file.size // count for number in range(count + 1)]
        return [Piece(file, start, stop, stop - start) for start, stop in pairwise(edges)]
    if reader.group_sizes is None:
        return whole
    try:
        sizes = reader.group_sizes(file)
    except StorageError as error:
        raise DataError(str(error)) from error
    except pa.ArrowException as error:
        raise DataError(f"{file.shown} is not a sound {file.kind} file; make it again") from error
    except OSError as error:
        raise DataError(cannot_read(file.shown, error)) from error
    if len(sizes) < 2:
        return whole
    pieces = [Piece(file, 0, 1, sizes[0])]
    for number, size in enumerate(sizes[1:], start=1):
        last = pieces[-1]
        if last.size + size <= part_bytes:
            pieces[-1] = replace(last, stop=number + 1, size=last.size + size)
        else:
            pieces.append(Piece(file, number, number + 1, size))
    return pieces
