"""Reads token shards: sizes from the indexes, sequences from the record batches that a rank needs.

`ShardFiles` (`cache.py`) decides where the files are read, and whether they are copied first.
"""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from dist_ft.data.shards.shard_file import ARROW, BATCH_SEQUENCES, INDEX, SCHEMA, IndexRows, ShardInfo
from dist_ft.data.stream.order import WINDOW_SHARDS
from dist_ft.data.stream.permute import Ints
from dist_ft.errors import DataError

MAX_OPEN = 3 * WINDOW_SHARDS
"""Shards of a source that are kept mapped: two windows and one spare. No descriptor stays open."""

DAMAGED = (
    "is damaged: its bytes are not those that were written. Delete it and the files of the same name with another "
    "ending, and resume: the shard is prepared anew"
)

Row = tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_], npt.NDArray[np.int32]]
"""`input_ids`, `trained` and `starts` of a sequence."""


@dataclass(frozen=True)
class ShardFile:
    """A file of a shard, mapped.

    Attributes:
        path: Path on this machine.
        data: Bytes of the file; they stay readable when the file is deleted.
    """

    path: Path
    data: pa.Buffer


class ShardFiles(Protocol):
    """Gives a reader the files of shards."""

    def info(self, key: str) -> ShardInfo:
        """Returns the description of a shard; may wait until the shard is prepared."""
        ...

    def open(self, info: ShardInfo, ending: str, damaged: Collection[Path] = ()) -> ShardFile:
        """Maps a shard's file; may copy it to this machine first. Never returns one of the `damaged` files."""
        ...

    @property
    def is_local(self) -> bool:
        """Whether files are read in place."""
        ...

    def close(self) -> None:
        """Ends all waits with an error."""
        ...


class TokenShards:
    """The shards of one prepared source. Not safe for several threads, unless a method says so.

    Args:
        keys: Keys of the shards, in the source's order.
        files: Source of the files.
        sizes: Sequences of each shard, if all are known.
        made_sizes: If not all are known: sequences of each shard that was made before, None for the others, which are
            read from the store.
    """

    def __init__(
        self,
        keys: Sequence[str],
        files: ShardFiles,
        sizes: Ints | None = None,
        made_sizes: Sequence[int | None] = (),
    ) -> None:
        self._keys, self._files, self._sizes = keys, files, sizes
        self._made_sizes = {shard: size for shard, size in enumerate(made_sizes) if size is not None}
        self._opened: OrderedDict[int, _OpenShard] = OrderedDict()

    @property
    def num_shards(self) -> int:
        """Number of shards of the source."""
        return len(self._keys)

    @property
    def known_sizes(self) -> Ints | None:
        """Sequences of each shard; None unless all are known."""
        return self._sizes

    @property
    def is_local(self) -> bool:
        """Whether files are read in place, so that there is nothing to fetch."""
        return self._files.is_local

    def num_sequences(self, shards: Ints) -> Ints:
        """Returns the number of sequences of some shards; waits for shards that are not prepared yet."""
        if self._sizes is not None:
            return self._sizes[shards]
        sizes = []
        for shard in shards.tolist():
            made = self._made_sizes.get(shard)
            sizes.append(self._files.info(self._keys[shard]).counts.num_sequences if made is None else made)
        return np.array(sizes, np.int64)

    def index_rows(self, shard: int, rows: Ints) -> IndexRows:
        """Returns the index entries of some rows of a shard."""
        found = self._open(shard).index[rows].astype(np.int64)
        return IndexRows(found[:, 0], found[:, 1])

    def read(self, shard: int, row: int) -> Row:
        """Returns `input_ids`, `trained` and `starts` of a row.

        Raises:
            DataError: The record batch that holds the row is damaged.
        """
        return self._open(shard).row(row)

    def close(self) -> None:
        """Releases all files; a call that waits for a file fails. Any thread may call this."""
        self._files.close()

    def fetch(self, shard: int) -> None:
        """Copies a shard's files to this machine unless they are there already. Any thread may call this."""
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
    """A mapped shard: its index, and the record batches that were read so far."""

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
        return _Batch(pa.ipc.read_record_batch(self._arrow.data[start:end], SCHEMA))


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


def _open_whole(files: ShardFiles, info: ShardInfo, ending: str, is_whole: Callable[[pa.Buffer], bool]) -> ShardFile:
    """Opens a shard's file and checks its bytes; tries every copy until one is whole."""
    damaged: set[Path] = set()
    while True:
        file = files.open(info, ending, damaged)
        if is_whole(file.data):
            return file
        if file.path in damaged:
            raise DataError(f"{file.path} {DAMAGED}")
        damaged.add(file.path)
