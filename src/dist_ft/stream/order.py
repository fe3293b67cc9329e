"""Which sequence stands at which position of the stream: a pure function of (sources, seed, position).

World size, node and attempt do not appear here; that is what makes a resume at any size exact. Nothing is
materialised: locating a position costs the same at the first and at the billionth sequence. Torch-free.

Worked example. Two sources of 6 and 3 sequences without weights make epochs of 9 positions. The nested
division in `_split` gives each source its share at a steady rate (B A A B A A B A A), and each source walks
through its own permutation: shards in a seeded order, rows permuted inside a window of neighbouring shards,
so that a reader touches few files at a time.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import xxhash

WINDOW_SHARDS = 8
"""Shards whose rows are mixed with one another; a reader has at most two windows open."""
_MASK64 = (1 << 64) - 1


@dataclass(frozen=True)
class SequenceId:
    """Names one use of one sequence, for ever.

    Attributes:
        source: Index of the source in `data.train`.
        pass_index: How often the source had been used up before.
        row: Row over all shards of the source, in file order.
    """

    source: int
    pass_index: int
    row: int


@dataclass(frozen=True)
class SourceSpec:
    """What order must know of a source.

    Attributes:
        shard_sizes: Sequences in each token shard.
        share: Sequences that an epoch takes of it.
    """

    shard_sizes: tuple[int, ...]
    share: int

    @property
    def num_sequences(self) -> int:
        """Sequences of one pass."""
        return sum(self.shard_sizes)


@dataclass(frozen=True)
class Order:
    """The stream of a run.

    Attributes:
        sources: The sources, in config order.
        seed: `run.seed`.
    """

    sources: tuple[SourceSpec, ...]
    seed: int

    @property
    def epoch_size(self) -> int:
        """Positions of one epoch."""
        return sum(source.share for source in self.sources)

    def locate(self, position: int) -> SequenceId:
        """Returns the sequence at a position, which counts on across epochs."""
        epoch, offset = divmod(position, self.epoch_size)
        source, used = _split(offset, tuple(s.share for s in self.sources))
        spec = self.sources[source]
        pass_index, index = divmod(epoch * spec.share + used, spec.num_sequences)
        row = _permute_rows(spec.shard_sizes, index, _mix(self.seed, source, pass_index))
        return SequenceId(source, pass_index, row)


def shares(sizes: Sequence[int], weights: Sequence[float] | None) -> list[int]:
    """Returns the sequences that an epoch takes of each source.

    Without weights every sequence once. With weights an epoch has as many positions as there are sequences,
    divided by largest remainder; a source may then be repeated or used in part.
    """
    total = sum(sizes)
    if weights is None:
        return list(sizes)
    exact = [total * weight / math.fsum(weights) for weight in weights]
    result = [int(x) for x in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (result[i] - exact[i], i))
    for i in by_remainder[: total - sum(result)]:
        result[i] += 1
    return result


def step_positions(step: int, global_batch_size: int, total: int) -> range:
    """Returns the positions that step `step` (counted from 0) takes; the last step takes what is left."""
    return range(min(step * global_batch_size, total), min((step + 1) * global_batch_size, total))


def run_length(epoch_size: int, global_batch_size: int, epochs: float, max_steps: int | None) -> tuple[int, int]:
    """Returns `(steps, positions)` of a run; nothing is dropped and nothing repeated to fill up."""
    if max_steps is not None:
        return max_steps, max_steps * global_batch_size
    total = max(1, round(epochs * epoch_size))
    return -(-total // global_batch_size), total


def digest(ids: Iterable[SequenceId]) -> str:
    """Returns the commutative digest of the sequences of a step: the proof of what was consumed."""
    total = 0
    for i in ids:
        total += xxhash.xxh3_64_intdigest(f"{i.source}:{i.pass_index}:{i.row}".encode())
    return f"{total & _MASK64:016x}"


def permute(index: int, size: int, key: int) -> int:
    """Returns where a seeded permutation of `range(size)` sends `index`, in O(1) memory.

    A four-round Feistel network (Luby and Rackoff 1988) over the next even power of two, walked until the
    value falls below `size` (Black and Rogaway 2002, cycle walking: two rounds of walking on average).
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    value = index
    while True:
        left, right = value >> half, value & mask
        for round_index in range(4):
            left, right = right, left ^ (_mix(key, round_index, right) & mask)
        value = left << half | right
        if value < size:
            return value


def _split(offset: int, share: tuple[int, ...]) -> tuple[int, int]:
    """Returns (source, how many of its sequences came before) for a position inside an epoch.

    Source 0 takes positions at its rate, source 1 at its rate of what is left, and so on: floor functions
    only, so every count is monotone, exact at the epoch's end, and known without a walk.
    """
    left, total = offset, sum(share)
    for source, size in enumerate(share):
        if size == 0:
            continue
        before = left * size // total
        if (left + 1) * size // total > before:
            return source, before
        left -= before
        total -= size
    raise AssertionError(f"offset {offset} lies outside the epoch {share}")


def _permute_rows(shard_sizes: tuple[int, ...], index: int, key: int) -> int:
    """Returns the row (in file order) that stands at `index` of a pass."""
    shards, starts, first_rows = _pass_layout(shard_sizes, key)
    window = bisect_right(starts, index) - 1
    members = shards[window * WINDOW_SHARDS : (window + 1) * WINDOW_SHARDS]
    sizes = [shard_sizes[shard] for shard in members]
    place = permute(index - starts[window], sum(sizes), _mix(key, 1, window))
    for shard, size in zip(members, sizes, strict=True):
        if place < size:
            return first_rows[shard] + place
        place -= size
    raise AssertionError(f"index {index} lies outside the pass")


@lru_cache(maxsize=64)
def _pass_layout(shard_sizes: tuple[int, ...], key: int) -> tuple[list[int], list[int], list[int]]:
    """Returns (shards in the order of the pass, first index of each window, first row of each shard)."""
    count = len(shard_sizes)
    shards = [permute(i, count, _mix(key, 0)) for i in range(count)]
    windows = [sum(shard_sizes[s] for s in shards[at : at + WINDOW_SHARDS]) for at in range(0, count, WINDOW_SHARDS)]
    starts = [0, *itertools.accumulate(windows)][:-1]
    first_rows = [0, *itertools.accumulate(shard_sizes)][:-1]
    return shards, starts, first_rows


def _mix(*values: int) -> int:
    """Hashes integers to 64 bits (the finaliser of SplitMix64, Steele et al. 2014)."""
    state = 0
    for value in values:
        state = (state ^ (value & _MASK64)) + 0x9E3779B97F4A7C15 & _MASK64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK64
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK64
        state ^= state >> 31
    return state
