"""Reads and writes token shards: Arrow files of sequences, each with a small index and a JSON description.

`<key>.arrow` has one row a sequence: `input_ids` (list<int32>), `trained` (list<bool>), `starts` (list<int32>), then
columns of numbers, in record batches of 512. `<key>.index.npy` is int32 [sequences, 2]: tokens and trained tokens of
each; where the objective counts samples, their number is a third. `<key>.json` is the `ShardInfo`, written last:
without it, the shard does not exist. Every rank reads the indexes of a window, and the record batches that hold its own
slots. What a model scored (`score_file.py`) is a shard of columns alone, without an index.

Each record batch is checked against its hash when a process first reads it. The cost of finding damage is therefore in
proportion to what a rank reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from dist_ft.data.shards.columns import Column
from dist_ft.data.shards.counts import Counts
from dist_ft.data.shards.pack import PackedSequence
from dist_ft.errors import DataError
from dist_ft.slots import SlotTotals
from dist_ft.storage.publish import write_json
from dist_ft.storage.store import Store

ARROW, INDEX, INFO = ".arrow", ".index.npy", ".json"
"""Endings of a shard's files after its key."""
BATCH_SEQUENCES = 512
"""Sequences of a record batch; the last one of a shard may have fewer."""

_TOKENS = [("input_ids", pa.list_(pa.int32())), ("trained", pa.list_(pa.bool_())), ("starts", pa.list_(pa.int32()))]


def schema_of(columns: Sequence[Column], has_tokens: bool = True) -> pa.Schema:
    """Return the schema of an Arrow file."""
    numbers = [(column.name, column.arrow_type) for column in columns]
    return pa.schema([*(_TOKENS if has_tokens else []), *numbers])


@dataclass(frozen=True)
class ShardInfo:
    """Describes the contents of a shard, with hashes to check that it is whole.

    Attributes:
        key: Name of the shard; two shards with the same key hold the same sequences.
        counts: Totals.
        max_tokens: Tokens of the longest sequence.
        max_trained_tokens: Most trained tokens of one sequence.
        num_bytes: Size of the Arrow file.
        hash: xxh3-128 of the Arrow file.
        num_index_bytes: Size of the index; 0 for scores, which have none.
        index_hash: xxh3-128 of the index.
        batch_bounds: Offsets of the record batches in the Arrow file, and the end of the last one.
        batch_hashes: xxh3-64 of each record batch.
        columns: Columns of numbers.
    """

    key: str
    counts: Counts
    max_tokens: int
    max_trained_tokens: int
    num_bytes: int
    hash: str
    num_index_bytes: int
    index_hash: str
    batch_bounds: tuple[int, ...]
    batch_hashes: tuple[str, ...]
    columns: tuple[Column, ...] = ()

    @property
    def schema(self) -> pa.Schema:
        """Schema of the Arrow file."""
        return schema_of(self.columns, has_tokens=self.num_index_bytes > 0)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON object, in which the counts are on one level with the other fields."""
        values = asdict(self)
        key, counts = values.pop("key"), values.pop("counts")
        lists = {"batch_bounds": list(self.batch_bounds), "batch_hashes": list(self.batch_hashes)}
        columns = {"columns": [column.to_dict() for column in self.columns]}
        return {"key": key, **counts, **values, **lists, **columns}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ShardInfo:
        """Inverse of `to_dict`; extra keys are ignored. Shards of earlier versions name no columns.

        Raises:
            KeyError: A field is missing.
        """
        known = {"counts", "columns"}
        values = {field.name: data[field.name] for field in fields(cls) if field.name not in known}
        lists = {"batch_bounds": tuple(data["batch_bounds"]), "batch_hashes": tuple(data["batch_hashes"])}
        columns = tuple(Column(**column) for column in data.get("columns", ()))
        return cls(counts=Counts.from_dict(data), columns=columns, **{**values, **lists})


@dataclass(frozen=True)
class IndexRows:
    """Holds the index entries of some sequences, as arrays of one length.

    Attributes:
        num_tokens: Tokens of each sequence.
        num_trained_tokens: Tokens of each sequence whose prediction is trained.
        num_samples: Samples of each sequence; 0 in shards that do not count them.
    """

    num_tokens: npt.NDArray[np.int64]
    num_trained_tokens: npt.NDArray[np.int64]
    num_samples: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.num_tokens)

    @property
    def totals(self) -> SlotTotals:
        """The totals of the sequences."""
        sums = (int(counts.sum()) for counts in (self.num_tokens, self.num_trained_tokens, self.num_samples))
        return SlotTotals(len(self), *sums)

    @classmethod
    def of(cls, index: npt.NDArray[np.int32]) -> IndexRows:
        """Return entries of an index [sequences, 2 or 3]."""
        wide = index.astype(np.int64)
        return cls(wide[:, 0], wide[:, 1], wide[:, 2] if wide.shape[1] > 2 else np.zeros_like(wide[:, 0]))


class ArrowWriter:
    """Writes an Arrow file in record batches, and computes their bounds and hashes.

    Args:
        path: The file; nothing is synced.
        schema: Its columns.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._path, self._schema = path, schema
        self._sink = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._sink, schema)
        # Behind the magic bytes and the schema, in files of this version of Arrow.
        self._bounds = [8 + schema.serialize().size]

    def write(self, columns: Sequence[Sequence[Any]]) -> None:
        """Write a record batch: the rows of each column."""
        arrays = [pa.array(rows, field.type) for rows, field in zip(columns, self._schema, strict=True)]
        self._writer.write_batch(pa.record_batch(arrays, schema=self._schema))
        self._bounds.append(self._sink.tell())

    def close(self) -> ArrowFile:
        """Finishes the file and describes it."""
        self.abandon()
        data = map_file(self._path)
        hashes = (xxhash.xxh3_64_hexdigest(data[start:end]) for start, end in pairwise(self._bounds))
        return ArrowFile(data.size, xxhash.xxh3_128_hexdigest(data), tuple(self._bounds), tuple(hashes))

    def abandon(self) -> None:
        """Close the file without describing it."""
        self._writer.close()
        self._sink.close()


class ArrowFile(NamedTuple):
    """Describes a written Arrow file; the fields are those of `ShardInfo`."""

    num_bytes: int
    hash: str
    batch_bounds: tuple[int, ...]
    batch_hashes: tuple[str, ...]


class ShardWriter:
    """Writes one shard piece by piece; memory stays at one record batch and the index.

    The files appear in `directory` as they are written; nothing is synced. Only `close` writes the JSON file, so a
    shard whose writer died does not exist for readers. Leaving the `with` block without `close` removes the files.

    Args:
        directory: An existing directory.
        key: Name of the shard.
        columns: Columns of numbers, one for a sample.
        counts_samples: Whether the index has the number of samples of each sequence.
    """

    def __init__(self, directory: Path, key: str, columns: Sequence[Column] = (), counts_samples: bool = False) -> None:
        self._directory, self._key, self._columns = directory, key, tuple(columns)
        self._index_width = 3 if counts_samples else 2
        self._arrow = ArrowWriter(self._path(ARROW), schema_of(columns))
        self._waiting: list[PackedSequence] = []
        self._sizes: list[npt.NDArray[np.int32]] = [np.zeros((0, 3), np.int32)]
        self._is_closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if not self._is_closed:
            with suppress(OSError):  # such as a full disk; the error that ended the work is the one to show
                self._arrow.abandon()
            for ending in (ARROW, INDEX):
                self._path(ending).unlink(missing_ok=True)

    def add(self, sequences: Iterable[PackedSequence]) -> None:
        """Add sequences at the end."""
        for sequence in sequences:
            self._waiting.append(sequence)
            if len(self._waiting) == BATCH_SEQUENCES:
                self._write_batch()

    def close(self, rows: Counts) -> ShardInfo:
        """Finishes the shard; `<key>.json` is written last.

        Args:
            rows: Counts of rows and samples, which only the caller knows. The writer counts sequences and tokens.
        """
        if self._waiting:
            self._write_batch()
        arrow = self._arrow.close()
        sizes = np.concatenate(self._sizes)
        np.save(self._path(INDEX), sizes[:, : self._index_width])
        index = self._path(INDEX).read_bytes()
        most = sizes.max(axis=0, initial=0)
        num_tokens, num_trained, num_samples = map(int, sizes.sum(axis=0, dtype=np.int64))
        info = ShardInfo(
            key=self._key,
            counts=replace(
                rows, num_sequences=len(sizes), num_tokens=num_tokens, num_trained_tokens=num_trained,
                num_samples=num_samples,
            ),
            max_tokens=int(most[0]), max_trained_tokens=int(most[1]),
            num_index_bytes=len(index), index_hash=xxhash.xxh3_128_hexdigest(index),
            columns=self._columns, **arrow._asdict(),
        )  # fmt: skip
        write_json(self._path(INFO), info.to_dict())
        self._is_closed = True
        return info

    def _write_batch(self) -> None:
        batch = self._waiting
        numbers = [[s.numbers[column.name] for s in batch] for column in self._columns]
        self._arrow.write(
            [[s.input_ids for s in batch], [s.trained for s in batch], [s.starts for s in batch], *numbers]
        )
        self._sizes.append(np.array([(len(s.input_ids), sum(s.trained), len(s.starts)) for s in batch], np.int32))
        self._waiting = []

    def _path(self, ending: str) -> Path:
        return self._directory / f"{self._key}{ending}"


def read_info(store: Store, key: str) -> ShardInfo:
    """Return the description of a shard.

    Raises:
        FileNotFoundError: The shard is not made yet.
        DataError: The description is damaged.
    """
    name = f"{key}{INFO}"
    try:
        info = ShardInfo.from_dict(json.loads(store.read(name)))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{name} is damaged ({type(error).__name__}: {error}); delete it and resume") from error
    if info.key != key:
        raise DataError(f"{name} describes another shard ({info.key}); delete the files of that name and resume")
    return info


def map_file(path: Path) -> pa.Buffer:
    """Map a file and return its bytes. No descriptor stays open, and the bytes stay readable if it is deleted."""
    with pa.memory_map(str(path), "r") as file:
        return file.read_buffer()
