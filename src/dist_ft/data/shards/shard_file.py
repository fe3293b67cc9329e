"""Token shards: Arrow files of finished sequences, each with a small index and a JSON file that says what it holds.

`<key>.arrow` has one row a sequence: `input_ids` (list<int32>), `trained` (list<bool>), `starts` (list<int32>), in
record batches of 512. `<key>.index.npy` is int32 [sequences, 2]: tokens and trained tokens of each. `<key>.json` is
the `ShardInfo`, written last: the shard exists when it does. Every rank reads the indexes of a window, and the
record batches in which its own slots lie.

Each record batch is checked against its hash when a process first touches it, so damage is found at a cost in
proportion to what a rank reads, wherever the file lies.
"""

from __future__ import annotations

import io
import json
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from dist_ft.data.shards.pack import PackedSequence
from dist_ft.data.stream.order import WINDOW_SHARDS
from dist_ft.data.stream.permute import Ints
from dist_ft.errors import DataError
from dist_ft.layout import write_json
from dist_ft.storage.store import Store

ARROW, INDEX, INFO = ".arrow", ".index.npy", ".json"
"""Endings of a shard's files after its key."""
BATCH_SEQUENCES = 512
"""Sequences of a record batch; the last one of a shard may have fewer."""
MAX_OPEN = 3 * WINDOW_SHARDS
"""Shards of a source that are kept mapped: two windows and some air. No descriptor stays open."""

_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("trained", pa.list_(pa.bool_())),
        ("starts", pa.list_(pa.int32())),
    ]
)
_FIRST_BATCH = 8 + _SCHEMA.serialize().size
"""Where a writer of this version of Arrow puts the first record batch: after magic bytes and schema."""

DAMAGED = (
    "is damaged: its bytes are not those that were written. Delete it and the files of the same name with another "
    "ending, and resume: the shard is prepared anew"
)

Row = tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_], npt.NDArray[np.int32]]
"""`input_ids`, `trained` and `starts` of a sequence."""


@dataclass(frozen=True)
class ShardInfo:
    """What a shard holds, and how to tell that it is whole.

    Attributes:
        key: Its name; two shards with the same key hold the same sequences.
        num_rows: Rows used, those that give no trained token included.
        num_sequences: Sequences after packing.
        num_tokens: Tokens of all sequences.
        num_trained_tokens: Tokens whose prediction is trained.
        num_untrained_rows: Rows left out because no token of theirs would be trained.
        num_long_samples: Samples longer than `seq_len`, treated as `data.long_samples` says.
        num_bad_rows: Rows left out because they cannot be used.
        max_tokens: Tokens of the longest sequence.
        max_trained_tokens: Most trained tokens of one sequence.
        num_bytes: Of the Arrow file.
        hash: xxh3-128 of the Arrow file.
        num_index_bytes: Of the index.
        index_hash: xxh3-128 of the index.
        batch_bounds: Where the record batches begin in the Arrow file, and the end of the last one.
        batch_hashes: xxh3-64 of each record batch.
    """

    key: str
    num_rows: int
    num_sequences: int
    num_tokens: int
    num_trained_tokens: int
    num_untrained_rows: int
    num_long_samples: int
    num_bad_rows: int
    max_tokens: int
    max_trained_tokens: int
    num_bytes: int
    hash: str
    num_index_bytes: int
    index_hash: str
    batch_bounds: tuple[int, ...]
    batch_hashes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON object."""
        return {**asdict(self), "batch_bounds": list(self.batch_bounds), "batch_hashes": list(self.batch_hashes)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ShardInfo:
        """Inverse of `to_dict`, extra keys ignored.

        Raises:
            KeyError: A field is missing.
        """
        values = {field.name: data[field.name] for field in fields(cls)}
        return cls(
            **{**values, "batch_bounds": tuple(data["batch_bounds"]), "batch_hashes": tuple(data["batch_hashes"])},
        )


class ShardWriter:
    """Writes one shard piece by piece; memory stays at one record batch and the index.

    The files appear in `directory` as they are written; nothing is synced. Only `close` writes the JSON file, so a
    shard whose writer died does not exist to readers. Leaving the `with` block without `close` removes the rest.

    Args:
        directory: Exists.
        key: Name of the shard.
    """

    def __init__(self, directory: Path, key: str) -> None:
        self._directory, self._key = directory, key
        self._sink = pa.OSFile(str(self._path(ARROW)), "wb")
        self._writer = pa.ipc.new_file(self._sink, _SCHEMA)
        self._waiting: list[PackedSequence] = []
        self._sizes: list[npt.NDArray[np.int32]] = [np.zeros((0, 2), np.int32)]
        self._batch_bounds = [_FIRST_BATCH]
        self._is_closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if not self._is_closed:
            with suppress(OSError):  # of a full disk: the error that ended the work is the one to show
                self._finish_arrow()
            for ending in (ARROW, INDEX):
                self._path(ending).unlink(missing_ok=True)

    def add(self, sequences: Iterable[PackedSequence]) -> None:
        """Adds sequences at the end."""
        for sequence in sequences:
            self._waiting.append(sequence)
            if len(self._waiting) == BATCH_SEQUENCES:
                self._write_batch()

    def close(
        self, num_rows: int, num_untrained_rows: int = 0, num_long_samples: int = 0, num_bad_rows: int = 0
    ) -> ShardInfo:
        """Finishes the shard; the counts are those that only the caller knows. `<key>.json` is written last."""
        if self._waiting:
            self._write_batch()
        self._finish_arrow()
        sizes = np.concatenate(self._sizes)
        np.save(self._path(INDEX), sizes)
        arrow, index = map_file(self._path(ARROW)), self._path(INDEX).read_bytes()
        most = sizes.max(axis=0, initial=0)
        info = ShardInfo(
            key=self._key, num_rows=num_rows, num_sequences=len(sizes), num_tokens=int(sizes[:, 0].sum(dtype=np.int64)),
            num_trained_tokens=int(sizes[:, 1].sum(dtype=np.int64)), num_untrained_rows=num_untrained_rows,
            num_long_samples=num_long_samples, num_bad_rows=num_bad_rows, max_tokens=int(most[0]),
            max_trained_tokens=int(most[1]), num_bytes=arrow.size, hash=xxhash.xxh3_128_hexdigest(arrow),
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
        arrays = [pa.array(column, field.type) for column, field in zip(columns, _SCHEMA, strict=True)]
        self._writer.write_batch(pa.record_batch(arrays, schema=_SCHEMA))
        self._batch_bounds.append(self._sink.tell())
        self._sizes.append(np.array([(len(s.input_ids), sum(s.trained)) for s in batch], np.int32))
        self._waiting = []

    def _finish_arrow(self) -> None:
        self._writer.close()
        self._sink.close()

    def _path(self, ending: str) -> Path:
        return self._directory / f"{self._key}{ending}"


@dataclass(frozen=True)
class ShardFile:
    """A file of a shard, mapped.

    Attributes:
        path: Where it lies on this machine.
        data: Its bytes; they stay readable when the file is deleted.
    """

    path: Path
    data: pa.Buffer


class ShardFiles(Protocol):
    """Where a reader gets the files of shards from."""

    def info(self, key: str) -> ShardInfo:
        """Returns what a shard holds; may wait until it is prepared."""
        ...

    def open(self, info: ShardInfo, ending: str, damaged: Collection[Path] = ()) -> ShardFile:
        """Maps a shard's file; may copy it to this machine first. Files found to be damaged are not given again."""
        ...

    @property
    def is_local(self) -> bool:
        """Whether files are read where they lie."""
        ...

    def close(self) -> None:
        """Ends all waiting with an error."""
        ...


class TokenShards:
    """The shards of one prepared source. Not for several threads at once.

    Args:
        keys: Of the shards, in the source's order.
        files: Where they are.
        sizes: Sequences of each shard, where known; else each shard is asked.
    """

    def __init__(self, keys: Sequence[str], files: ShardFiles, sizes: Ints | None = None) -> None:
        self._keys, self._files, self._sizes = keys, files, sizes
        self._opened: OrderedDict[int, _OpenShard] = OrderedDict()

    @property
    def num_shards(self) -> int:
        """Shards of the source."""
        return len(self._keys)

    @property
    def known_sizes(self) -> Ints | None:
        """Sequences of each shard, where all are known."""
        return self._sizes

    @property
    def is_local(self) -> bool:
        """Whether files are read where they lie, so that there is nothing to fetch."""
        return self._files.is_local

    def num_sequences(self, shards: Ints) -> Ints:
        """Returns the sequences of some shards; waits where they are not prepared yet."""
        if self._sizes is not None:
            return self._sizes[shards]
        return np.array([self._files.info(self._keys[shard]).num_sequences for shard in shards.tolist()], np.int64)

    def sizes(self, shard: int, rows: Ints) -> npt.NDArray[np.int32]:
        """Returns [rows, 2], tokens and trained tokens of each, from the index alone."""
        return self._open(shard).index[rows]

    def read(self, shard: int, row: int) -> Row:
        """Returns `input_ids`, `trained` and `starts` of a row.

        Raises:
            DataError: The file is damaged where the row lies.
        """
        return self._open(shard).row(row)

    def close(self) -> None:
        """Lets go of all files; a call that waits for one fails. Another thread may call this."""
        self._files.close()

    def fetch(self, shard: int) -> None:
        """Brings a shard's files to this machine, if they are not there. Any thread may call this."""
        info = self._files.info(self._keys[shard])
        for ending in (INDEX, ARROW):
            self._files.open(info, ending)

    def _open(self, shard: int) -> _OpenShard:
        opened = self._opened.get(shard)
        if opened is None:
            while len(self._opened) >= MAX_OPEN:
                self._opened.popitem(last=False)
            opened = self._opened[shard] = _OpenShard(self._files, self._files.info(self._keys[shard]))
        self._opened.move_to_end(shard)
        return opened


class _OpenShard:
    """One mapped shard: its index, and those record batches that have been touched."""

    def __init__(self, files: ShardFiles, info: ShardInfo) -> None:
        self._files, self._info = files, info
        index = _open_whole(files, info, INDEX, lambda data: xxhash.xxh3_128_hexdigest(data) == info.index_hash)
        self.index: npt.NDArray[np.int32] = np.load(io.BytesIO(index.data.to_pybytes()))
        self._arrow: ShardFile | None = None
        self._spans = list(pairwise(info.batch_bounds))
        self._batches: dict[int, _Batch] = {}

    def row(self, row: int) -> Row:
        number, offset = divmod(row, BATCH_SEQUENCES)
        batch = self._batches.get(number)
        if batch is None:
            batch = self._batches[number] = self._verified(number)
        return batch.row(offset)

    def _verified(self, number: int) -> _Batch:
        start, end = self._spans[number]

        def is_whole(data: pa.Buffer) -> bool:
            return bool(xxhash.xxh3_64_hexdigest(data[start:end]) == self._info.batch_hashes[number])

        if self._arrow is None or not is_whole(self._arrow.data):
            self._arrow = _open_whole(self._files, self._info, ARROW, is_whole)
        return _Batch(pa.ipc.read_record_batch(self._arrow.data[start:end], _SCHEMA))


class _Batch:
    """Arrays over the memory of one record batch; nothing is copied until a row is unpacked."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        ids, trained, starts = batch.columns
        self._ends, self._ids = ids.offsets.to_numpy(), ids.values.to_numpy()
        self._start_ends, self._starts = starts.offsets.to_numpy(), starts.values.to_numpy()
        self._bits = np.frombuffer(trained.values.buffers()[1], np.uint8)

    def row(self, offset: int) -> Row:
        begin, end = int(self._ends[offset]), int(self._ends[offset + 1])
        bits = np.unpackbits(self._bits[begin >> 3 : (end + 7) >> 3], bitorder="little")
        trained = bits[begin & 7 : (begin & 7) + end - begin].view(np.bool_)
        return self._ids[begin:end], trained, self._starts[self._start_ends[offset] : self._start_ends[offset + 1]]


def read_info(store: Store, key: str) -> ShardInfo:
    """Returns what a shard holds.

    Raises:
        FileNotFoundError: It is yet to be made.
        DataError: Its description is damaged.
    """
    name = f"{key}{INFO}"
    try:
        return ShardInfo.from_dict(json.loads(store.read(name)))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{name} is damaged ({type(error).__name__}: {error}); delete it and resume") from error


def map_file(path: Path) -> pa.Buffer:
    """Returns a file's bytes, mapped; no descriptor stays open, and deleting the file does no harm."""
    with pa.memory_map(str(path), "r") as file:
        return file.read_buffer()


def _open_whole(files: ShardFiles, info: ShardInfo, ending: str, is_whole: Callable[[pa.Buffer], bool]) -> ShardFile:
    """Opens a file whose bytes are right, from wherever there is one."""
    damaged: set[Path] = set()
    while True:
        file = files.open(info, ending, damaged)
        if is_whole(file.data):
            return file
        if file.path in damaged:
            raise DataError(f"{file.path} {DAMAGED}")
        damaged.add(file.path)
