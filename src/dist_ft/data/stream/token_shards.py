"""Reads token shards: sizes from the indexes, sequences from the record batches that a rank needs.

`ShardFiles` (`cache.py`) decides where the files are read, and whether they are copied first.
"""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from dist_ft.data.shards.columns import Column, Numbers
from dist_ft.data.shards.score_file import scores_name
from dist_ft.data.shards.shard_file import ARROW, BATCH_SEQUENCES, INDEX, IndexRows, ShardInfo
from dist_ft.data.stream.order import WINDOW_SHARDS
from dist_ft.data.stream.permute import Ints
from dist_ft.errors import DataError

MAX_OPEN = 3 * WINDOW_SHARDS
"""Shards of a source that are kept mapped: two windows and one spare. No descriptor stays open."""

DAMAGED = (
    "is damaged: its bytes are not those that were written. Delete it and the files of the same name with another "
    "ending, and resume: the shard is prepared anew"
)


class Row(NamedTuple):
    """A sequence.

    Attributes:
        input_ids: Tokens.
        trained: For each token, whether its prediction is trained.
        starts: Index of the first token of each sample.
        numbers: By column, the entries of the sequence: from the token shard and from the scores.
    """

    input_ids: npt.NDArray[np.int32]
    trained: npt.NDArray[np.bool_]
    starts: npt.NDArray[np.int32]
    numbers: Mapping[str, Numbers] = MappingProxyType({})


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
        """Return the description of a shard; may wait until the shard is prepared."""
        ...

    def open(self, info: ShardInfo, ending: str, damaged: Collection[Path] = ()) -> ShardFile:
        """Map a shard's file; may copy it to this machine first. Never returns one of the `damaged` files."""
        ...

    @property
    def is_local(self) -> bool:
        """Whether files are read in place."""
        ...

    def close(self) -> None:
        """End all waits with an error."""
        ...


class TokenShards:
    """The shards of one prepared source. Not safe for several threads, unless a method says so.

    Args:
        keys: Keys of the shards, in the source's order.
        files: Source of the files.
        sizes: Sequences of each shard, if all are known.
        made_sizes: If not all are known: sequences of each shard that was made before, None for the others, which are
            read from the store.
        score_key: Key of the scores that belong to the sequences; empty for none.
    """

    def __init__(
        self,
        keys: Sequence[str],
        files: ShardFiles,
        sizes: Ints | None = None,
        made_sizes: Sequence[int | None] = (),
        score_key: str = "",
    ) -> None:
        self._keys, self._files, self._sizes, self._score_key = keys, files, sizes, score_key
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
        """Return the number of sequences of some shards; wait for shards that are not prepared yet."""
        if self._sizes is not None:
            return self._sizes[shards]
        sizes = []
        for shard in shards.tolist():
            made = self._made_sizes.get(shard)
            sizes.append(self._files.info(self._keys[shard]).counts.num_sequences if made is None else made)
        return np.array(sizes, np.int64)

    def index_rows(self, shard: int, rows: Ints) -> IndexRows:
        """Return the index entries of some rows of a shard."""
        return IndexRows.of(self._open(shard).index[rows])

    def read(self, shard: int, row: int) -> Row:
        """Return the sequence of a row; wait for its scores, if they are not made yet.

        Raises:
            DataError: The record batch that holds the row is damaged, or the scores are of another shard.
        """
        return self._open(shard).row(row)

    def close(self) -> None:
        """Releases all files; a call that waits for a file fails. Any thread may call this."""
        self._files.close()

    def fetch(self, shard: int) -> None:
        """Copy a shard's files to this machine unless they are there already. Any thread may call this."""
        info = self._files.info(self._keys[shard])
        for ending in (INDEX, ARROW):
            self._files.open(info, ending)
        if self._score_key:
            self._files.open(self._files.info(scores_name(self._keys[shard], self._score_key)), ARROW)

    def _open(self, shard: int) -> _OpenShard:
        opened = self._opened.get(shard)
        if opened is None:
            while len(self._opened) >= MAX_OPEN:
                self._opened.popitem(last=False)
            key = self._keys[shard]
            scores = scores_name(key, self._score_key) if self._score_key else None
            opened = self._opened[shard] = _OpenShard(self._files, self._files.info(key), scores)
        self._opened.move_to_end(shard)
        return opened


class _OpenShard:
    """A mapped shard: its index, its sequences, and their scores once they are asked for."""

    def __init__(self, files: ShardFiles, info: ShardInfo, scores_key: str | None) -> None:
        index = _open_whole(files, info, INDEX, lambda data: xxhash.xxh3_128_hexdigest(data) == info.index_hash)
        self.index: npt.NDArray[np.int32] = np.load(io.BytesIO(index.data.to_pybytes()))
        self._files, self._sequences, self._scores_key = files, _OpenArrow(files, info), scores_key
        self._scores: _OpenArrow | None = None

    def row(self, row: int) -> Row:
        batch, offset = self._sequences.find(row)
        sequence = batch.row(offset)
        if self._scores_key is None:
            return sequence
        if self._scores is None:
            info = self._files.info(self._scores_key)
            if info.counts.num_sequences != len(self.index):
                raise DataError(
                    f"the scores {info.key} have {info.counts.num_sequences} sequences and the shard has "
                    f"{len(self.index)}; delete the files of that name and resume: the scores are made anew"
                )
            self._scores = _OpenArrow(self._files, info)
        batch, offset = self._scores.find(row)
        return sequence._replace(numbers={**sequence.numbers, **batch.numbers(offset)})


class _OpenArrow:
    """A mapped Arrow file, and the record batches that were read so far."""

    def __init__(self, files: ShardFiles, info: ShardInfo) -> None:
        self._files, self._info = files, info
        self._arrow: ShardFile | None = None
        self._spans = list(pairwise(info.batch_bounds))
        self._batches: dict[int, _Batch] = {}

    def find(self, row: int) -> tuple[_Batch, int]:
        """Return the record batch of a row, checked, and the row's offset in it."""
        number, offset = divmod(row, BATCH_SEQUENCES)
        batch = self._batches.get(number)
        if batch is None:
            batch = self._batches[number] = self._verified(number)
        return batch, offset

    def _verified(self, number: int) -> _Batch:
        start, end = self._spans[number]

        def is_whole(data: pa.Buffer) -> bool:
            return bool(xxhash.xxh3_64_hexdigest(data[start:end]) == self._info.batch_hashes[number])

        if self._arrow is None or not is_whole(self._arrow.data):
            self._arrow = _open_whole(self._files, self._info, ARROW, is_whole)
        return _Batch(pa.ipc.read_record_batch(self._arrow.data[start:end], self._info.schema), self._info.columns)


class _Batch:
    """Arrays over the memory of one record batch; nothing is copied until a row is unpacked."""

    def __init__(self, batch: pa.RecordBatch, columns: Sequence[Column]) -> None:
        lists = batch.columns[: len(batch.columns) - len(columns)]
        if lists:
            ids, trained, starts = lists
            self._ends, self._ids = ids.offsets.to_numpy(), ids.values.to_numpy()
            self._start_ends, self._starts = starts.offsets.to_numpy(), starts.values.to_numpy()
            self._bits = np.frombuffer(trained.values.buffers()[1], np.uint8)
        self._numbers = {
            column: (found.offsets.to_numpy(), found.values.to_numpy())
            for column, found in zip(columns, batch.columns[len(lists) :], strict=True)
        }

    def row(self, offset: int) -> Row:
        begin, end = int(self._ends[offset]), int(self._ends[offset + 1])
        bits = np.unpackbits(self._bits[begin >> 3 : (end + 7) >> 3], bitorder="little")
        trained = bits[begin & 7 : (begin & 7) + end - begin].view(np.bool_)
        starts = self._starts[self._start_ends[offset] : self._start_ends[offset + 1]]
        return Row(self._ids[begin:end], trained, starts, self.numbers(offset))

    def numbers(self, offset: int) -> dict[str, Numbers]:
        return {
            column.name: column.shaped(values[ends[offset] : ends[offset + 1]])
            for column, (ends, values) in self._numbers.items()
        }


def _open_whole(files: ShardFiles, info: ShardInfo, ending: str, is_whole: Callable[[pa.Buffer], bool]) -> ShardFile:
    """Open a shard's file and check its bytes; try every copy until one is whole."""
    damaged: set[Path] = set()
    while True:
        file = files.open(info, ending, damaged)
        if is_whole(file.data):
            return file
        if file.path in damaged:
            raise DataError(f"{file.path} {DAMAGED}")
        damaged.add(file.path)
