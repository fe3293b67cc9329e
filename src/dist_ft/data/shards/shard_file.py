"""Reads and writes token shards: Arrow files of sequences, each with a small index and a JSON description.

`<key>.arrow` has one row a sequence: `input_ids` (list<int32>), `trained` (list<bool>), `starts` (list<int32>), in
record batches of 512. `<key>.index.npy` is int32 [sequences, 2]: tokens and trained tokens of each. `<key>.json` is
the `ShardInfo`, written last: without it, the shard does not exist. Every rank reads the indexes of a window, and the
record batches that hold its own slots.

Each record batch is checked against its hash when a process first reads it. The cost of finding damage is therefore in
proportion to what a rank reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

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

SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("trained", pa.list_(pa.bool_())),
        ("starts", pa.list_(pa.int32())),
    ]
)
_FIRST_BATCH = 8 + SCHEMA.serialize().size
"""Offset of the first record batch, after the magic bytes and the schema, in files of this version of Arrow."""


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
        num_index_bytes: Size of the index.
        index_hash: xxh3-128 of the index.
        batch_bounds: Offsets of the record batches in the Arrow file, and the end of the last one.
        batch_hashes: xxh3-64 of each record batch.
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

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON object, in which the counts are on one level with the other fields."""
        values = asdict(self)
        key, counts = values.pop("key"), values.pop("counts")
        lists = {"batch_bounds": list(self.batch_bounds), "batch_hashes": list(self.batch_hashes)}
        return {"key": key, **counts, **values, **lists}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ShardInfo:
        """Inverse of `to_dict`; extra keys are ignored.

        Raises:
            KeyError: A field is missing.
        """
        values = {field.name: data[field.name] for field in fields(cls) if field.name != "counts"}
        lists = {"batch_bounds": tuple(data["batch_bounds"]), "batch_hashes": tuple(data["batch_hashes"])}
        return cls(counts=Counts(**{field.name: data[field.name] for field in fields(Counts)}), **{**values, **lists})


@dataclass(frozen=True)
class IndexRows:
    """Holds the index entries of some sequences, as arrays of one length.

    Attributes:
        num_tokens: Tokens of each sequence.
        num_trained_tokens: Tokens of each sequence whose prediction is trained.
    """

    num_tokens: npt.NDArray[np.int64]
    num_trained_tokens: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.num_tokens)

    @property
    def totals(self) -> SlotTotals:
        """The totals of the sequences."""
        return SlotTotals(len(self), int(self.num_tokens.sum()), int(self.num_trained_tokens.sum()))


class ShardWriter:
    """Writes one shard piece by piece; memory stays at one record batch and the index.

    The files appear in `directory` as they are written; nothing is synced. Only `close` writes the JSON file, so a
    shard whose writer died does not exist for readers. Leaving the `with` block without `close` removes the files.

    Args:
        directory: An existing directory.
        key: Name of the shard.
    """

    def __init__(self, directory: Path, key: str) -> None:
        self._directory, self._key = directory, key
        self._sink = pa.OSFile(str(self._path(ARROW)), "wb")
        self._writer = pa.ipc.new_file(self._sink, SCHEMA)
        self._waiting: list[PackedSequence] = []
        self._sizes: list[npt.NDArray[np.int32]] = [np.zeros((0, 2), np.int32)]
        self._batch_bounds = [_FIRST_BATCH]
        self._is_closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if not self._is_closed:
            with suppress(OSError):  # such as a full disk; the error that ended the work is the one to show
                self._finish_arrow()
            for ending in (ARROW, INDEX):
                self._path(ending).unlink(missing_ok=True)

    def add(self, sequences: Iterable[PackedSequence]) -> None:
        """Adds sequences at the end."""
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
        self._finish_arrow()
        sizes = np.concatenate(self._sizes)
        np.save(self._path(INDEX), sizes)
        arrow, index = map_file(self._path(ARROW)), self._path(INDEX).read_bytes()
        most = sizes.max(axis=0, initial=0)
        num_tokens, num_trained = map(int, sizes.sum(axis=0, dtype=np.int64))
        info = ShardInfo(
            key=self._key,
            counts=replace(rows, num_sequences=len(sizes), num_tokens=num_tokens, num_trained_tokens=num_trained),
            max_tokens=int(most[0]), max_trained_tokens=int(most[1]),
            num_bytes=arrow.size, hash=xxhash.xxh3_128_hexdigest(arrow),
            num_index_bytes=len(index), index_hash=xxhash.xxh3_128_hexdigest(index),
            batch_bounds=tuple(self._batch_bounds),
            batch_hashes=tuple(
                xxhash.xxh3_64_hexdigest(arrow[start:end]) for start, end in pairwise(self._batch_bounds)
            ),
        )  # fmt: skip
        write_json(self._path(INFO), info.to_dict())
        self._is_closed = True
        return info

    def _write_batch(self) -> None:
        batch = self._waiting
        columns = [[s.input_ids for s in batch], [s.trained for s in batch], [s.starts for s in batch]]
        arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
        self._writer.write_batch(pa.record_batch(arrays, schema=SCHEMA))
        self._batch_bounds.append(self._sink.tell())
        self._sizes.append(np.array([(len(s.input_ids), sum(s.trained)) for s in batch], np.int32))
        self._waiting = []

    def _finish_arrow(self) -> None:
        self._writer.close()
        self._sink.close()

    def _path(self, ending: str) -> Path:
        return self._directory / f"{self._key}{ending}"


def read_info(store: Store, key: str) -> ShardInfo:
    """Returns the description of a shard.

    Raises:
        FileNotFoundError: The shard is not made yet.
        DataError: The description is damaged.
    """
    name = f"{key}{INFO}"
    try:
        return ShardInfo.from_dict(json.loads(store.read(name)))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{name} is damaged ({type(error).__name__}: {error}); delete it and resume") from error


def map_file(path: Path) -> pa.Buffer:
    """Maps a file and returns its bytes. No descriptor stays open, and the bytes stay readable if it is deleted."""
    with pa.memory_map(str(path), "r") as file:
        return file.read_buffer()
