"""Token shards for tests: written as the preparation does, with random but known contents."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from dist_ft.config.data_sections import LoaderConfig
from dist_ft.data.shards.counts import Counts
from dist_ft.data.shards.pack import PackedSequence
from dist_ft.data.shards.shard_file import ShardInfo, ShardWriter
from dist_ft.data.stream.cache import Replica, ShardCache
from dist_ft.data.stream.token_shards import TokenShards
from dist_ft.errors import CheckpointError
from dist_ft.storage.store import LocalStore

Fault = Callable[[str, int, bytes], bytes]


class Remote:
    """An object store: what a directory holds, asked for by name; `fault(name, nth ask, data)` spoils answers."""

    def __init__(self, directory: Path, fault: Fault = lambda name, nth, data: data) -> None:
        self.inner, self.fault = LocalStore(directory), fault
        self.asked: Counter[str] = Counter()

    def read(self, name: str) -> bytes:
        return self._answer(name, self.inner.read(name))

    def read_range(self, name: str, start: int, count: int) -> bytes:
        data = self._answer(name, self.inner.read_range(name, start, count))
        if len(data) != count:
            raise CheckpointError(f"{name} ends early")
        return data

    def _answer(self, name: str, data: bytes) -> bytes:
        self.asked[name] += 1
        return self.fault(name, self.asked[name], data)


def make_sequence(rng: random.Random, first_token: int) -> PackedSequence:
    """One to four samples; the first token names the sequence, the others are small."""
    lengths = [rng.randint(1, 9) for _ in range(rng.randint(1, 4))]
    total = sum(lengths)
    starts = [0, *itertools.accumulate(lengths)][:-1]
    ids = [first_token, *(rng.randint(1, 99) for _ in range(total - 1))]
    trained = [place not in starts and rng.random() < 0.7 for place in range(total)]
    return PackedSequence(ids, trained, starts)


def write_shard(directory: Path, key: str, sequences: Sequence[PackedSequence]) -> ShardInfo:
    directory.mkdir(parents=True, exist_ok=True)
    with ShardWriter(directory, key) as writer:
        writer.add(sequences)
        return writer.close(Counts(num_rows=len(sequences)))


def write_shards(directory: Path, shard_sizes: Sequence[int], seed: int = 0) -> list[list[PackedSequence]]:
    """Writes `s0`, `s1`, …; returns what they hold."""
    rng = random.Random(seed)
    tokens = itertools.count(100_000 * (seed + 1))
    shards = [[make_sequence(rng, next(tokens)) for _ in range(size)] for size in shard_sizes]
    for index, sequences in enumerate(shards):
        write_shard(directory, f"s{index}", sequences)
    return shards


def open_shards(directory: Path, num_shards: int) -> TokenShards:
    """Opens what `write_shards` wrote, with sizes known."""
    files = ShardCache([Replica(str(directory), LocalStore(directory))], LoaderConfig())
    keys = [f"s{index}" for index in range(num_shards)]
    return TokenShards(keys, files, np.array([files.info(key).counts.num_sequences for key in keys], np.int64))


def places(shards: TokenShards) -> list[tuple[int, int]]:
    """Returns (shard, row) of every sequence, in order."""
    counts = shards.num_sequences(np.arange(shards.num_shards)).tolist()
    return [(shard, row) for shard, count in enumerate(counts) for row in range(count)]
