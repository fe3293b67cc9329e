"""Cuts source files into parts of about `PART_BYTES`. One task prepares a part, which becomes one token shard.

Large JSONL files are cut at byte offsets, without reading them; Parquet and Arrow files at row groups and record
batches. Other kinds and compressed files stay whole. Small neighbours share a part. The same files always give the
same parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice, pairwise
from typing import Any

import pyarrow as pa
import xxhash

from dist_ft.config.data_sections import RowBound
from dist_ft.data.sources.location import RawRow
from dist_ft.data.sources.readers import READERS, cannot_read, read_piece
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
        first_row: First row of the range that is used (`data.train[].rows`).
        stop_row: One more than its last row that is used; None means all.
    """

    file: SourceFile
    start: int
    stop: int | None
    size: int
    first_row: int = 0
    stop_row: int | None = None

    def rows(self) -> Iterator[RawRow]:
        """Yield its rows in file order, and read none behind the last that is used."""
        return islice(read_piece(self.file, self.start, self.stop), self.first_row, self.stop_row)


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
        """Return JSON values for the process that prepares the part. Do not store them: URLs keep their secrets."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Part:
        """Inverse of `to_dict`."""
        return cls(tuple(Piece(**{**piece, "file": SourceFile.from_dict(piece["file"])}) for piece in data["pieces"]))

    def identity(self) -> str:
        """Return a hash of its bytes and of how they are read, independent of file names."""
        said = [
            (
                p.file.kind, p.file.compression, p.file.identity, p.start, p.stop,
                *([p.first_row, p.stop_row] if (p.first_row, p.stop_row) != (0, None) else []),
            )
            for p in self.pieces
        ]  # fmt: skip
        return xxhash.xxh3_128_hexdigest(f"{said}".encode())


def cut_parts(
    files: Sequence[SourceFile], part_bytes: int = PART_BYTES, rows: Sequence[RowBound] | None = None
) -> list[Part]:
    """Return the parts of a source.

    Args:
        files: Files of one source, in order.
        part_bytes: Target size; a file or row group that cannot be cut may be larger.
        rows: `data.train[].rows`. The file is then read from its start to the last of them, and not cut.

    Raises:
        DataError: The footer of a file cannot be read.
    """
    if rows is None:
        with ThreadPoolExecutor(_THREADS) as pool:
            cut = list(pool.map(partial(_cut, part_bytes=part_bytes), files))
    else:
        cut = [[piece] for piece in _chosen(files, rows)]
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


def whole(files: Sequence[SourceFile], rows: Sequence[RowBound] | None = None) -> Part:
    """Return all files of a source, or the rows that are used of them, as one part."""
    if rows is not None:
        return Part(tuple(_chosen(files, rows)))
    return Part(tuple(Piece(file, 0, None, file.size) for file in files))


def _chosen(files: Sequence[SourceFile], rows: Sequence[RowBound]) -> list[Piece]:
    """Return the files that hold the rows of a range, each with its own range.

    Raises:
        DataError: No row is in the range.
    """
    first, stop = rows
    is_share = isinstance(first, str) or isinstance(stop, str)
    counts: list[int] = []
    for file in files:  # with numbers, no file behind the last row is opened
        if not is_share and isinstance(stop, int) and sum(counts) >= stop:
            break
        left = None if is_share or not isinstance(stop, int) else stop - sum(counts)
        counts.append(sum(1 for _ in islice(read_piece(file), left)))
    begin, end = _row_number(first or 0, sum(counts)), _row_number(sum(counts) if stop is None else stop, sum(counts))
    pieces, at = [], 0
    for file, count in zip(files, counts, strict=False):
        of_file = max(0, begin - at), min(count, end - at)
        if of_file[0] < of_file[1]:
            pieces.append(Piece(file, 0, None, file.size, *of_file))
        at += count
    if not pieces:
        raise DataError(
            f"{files[0].shown}: rows={list(rows)} holds none of the {sum(counts)} rows; name a first row that is "
            "there and a later end"
        )
    return pieces


def _row_number(bound: int | str, num_rows: int) -> int:
    """Return a bound as a number of rows; shares are rounded to the nearest row, as `datasets` does."""
    if isinstance(bound, int):
        return min(bound, num_rows)
    return round(float(bound.removesuffix("%")) * num_rows / 100)


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
