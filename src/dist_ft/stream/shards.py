"""Token shards: Arrow files of finished sequences, each with a small index, both memory-mapped.

`shard-00000.arrow` has one row a sequence: `input_ids` (list<int32>), `trained` (list<bool>), `starts`
(list<int32>). `shard-00000.index.npy` is int32 [rows, 2]: tokens and trained tokens of each row. Every rank
reads the indexes, and the data of its own slots only.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dist_ft.stream.pack import PackedSequence

_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("trained", pa.list_(pa.bool_())),
        ("starts", pa.list_(pa.int32())),
    ]
)


def shard_path(directory: Path, index: int) -> Path:
    """Path of a shard's data."""
    return directory / f"shard-{index:05d}.arrow"


def index_path(directory: Path, index: int) -> Path:
    """Path of a shard's index."""
    return directory / f"shard-{index:05d}.index.npy"


def write_shard(directory: Path, index: int, sequences: Sequence[PackedSequence]) -> None:
    """Writes a shard and its index."""
    directory.mkdir(parents=True, exist_ok=True)
    columns = {
        "input_ids": [s.input_ids for s in sequences],
        "trained": [s.trained for s in sequences],
        "starts": [s.starts for s in sequences],
    }
    table = pa.Table.from_pydict(columns, schema=_SCHEMA)
    with pa.OSFile(str(shard_path(directory, index)), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
        writer.write_table(table)
    rows = [(len(s.input_ids), sum(s.trained)) for s in sequences]
    np.save(index_path(directory, index), np.array(rows, dtype=np.int32).reshape(-1, 2))


class TokenShards:
    """The shards of one prepared source. Files are opened when first read."""

    def __init__(self, directory: Path, num_shards: int) -> None:
        self._directory = directory
        self._indexes = [np.load(index_path(directory, i), mmap_mode="r") for i in range(num_shards)]
        self._first_rows = np.cumsum([0, *[len(index) for index in self._indexes]])
        self._tables: dict[int, pa.Table] = {}

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """Sequences of each shard."""
        return tuple(len(index) for index in self._indexes)

    def sizes(self, row: int) -> tuple[int, int]:
        """Returns (tokens, trained tokens) of a row, from the index alone."""
        shard, offset = self._find(row)
        tokens, trained = self._indexes[shard][offset]
        return int(tokens), int(trained)

    def read(self, row: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_], npt.NDArray[np.int32]]:
        """Returns `input_ids`, `trained` and `starts` of a row."""
        shard, offset = self._find(row)
        table = self._tables.get(shard)
        if table is None:
            source = pa.memory_map(str(shard_path(self._directory, shard)), "r")
            table = self._tables[shard] = pa.ipc.open_file(source).read_all()
        return tuple(table.column(name)[offset].values.to_numpy(zero_copy_only=False) for name in _SCHEMA.names)

    def _find(self, row: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        return shard, row - int(self._first_rows[shard])
