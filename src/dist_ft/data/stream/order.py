"""Maps each position of the stream to a sequence: a pure function of (shards, rates, seed, position).

World size, node and attempt do not appear here, which makes a resume at any world size exact. Nothing is replayed:
locating a position costs the same at the first and at the billionth sequence. Torch-free.

Worked example. Two sources of 6 and 3 sequences without weights make epochs of 9 positions. `mixing` gives each
source its share at a steady rate (B A A B A A B A A), and each source walks through its own permutation: shards in
a seeded order, rows permuted inside a window of neighbouring shards, so that a reader touches few files at a time.

The sizes of a window's shards are read when the stream reaches the window, never before. A run whose data is still
being prepared therefore sees the same sequences as a run whose data is ready.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Protocol

import numpy as np

from dist_ft.data.stream.mixing import counts_before, epoch_size, rates_of, split
from dist_ft.data.stream.permute import Ints, Words, absorb, hash_of, permute
from dist_ft.errors import DataError

WINDOW_SHARDS = 8
"""Shards whose rows are mixed with one another; a reader has at most two windows of a source open."""
_MAX_LAYOUTS = 3
"""Passes over a source whose layouts are kept; a batch may reach into the next pass."""


class ShardSizes(Protocol):
    """Sizes of shards that may not be ready yet."""

    @property
    def num_shards(self) -> int:
        """Number of shards of the source."""
        ...

    def num_sequences(self, shards: Ints) -> Ints:
        """Return the number of sequences of some shards; may wait until they are ready."""
        ...


@dataclass(frozen=True)
class SequenceId:
    """Names one use of one sequence in a run. The name never changes.

    Attributes:
        source: Index of the source in `data.train`.
        pass_index: Number of passes over the source before this use.
        shard: Index of the shard in the source's list.
        row: Row in the shard.
    """

    source: int
    pass_index: int
    shard: int
    row: int


@dataclass(frozen=True)
class SequenceIds:
    """Many ids, as arrays of one length; the fields are those of `SequenceId`."""

    source: Ints
    pass_index: Ints
    shard: Ints
    row: Ints

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[SequenceId]:
        columns = (column.tolist() for column in (self.source, self.pass_index, self.shard, self.row))
        return (SequenceId(*values) for values in zip(*columns, strict=True))


class Order:
    """The stream of a run. The position is its only state; everything it keeps is a cache.

    Args:
        sources: Sizes of each source's shards, in config order; an array if all sizes are known.
        weights: `DataConfig.weights`. Without weights, sources share by their sizes, which must be known if there is
            more than one source.
        seed: `run.seed`.
        shuffle: `data.shuffle`; False takes shards and rows in their own order.
        exhaust: `data.exhaust`.
    """

    def __init__(
        self,
        sources: Sequence[Ints | ShardSizes],
        weights: Sequence[float] | None,
        seed: int,
        shuffle: bool = True,
        exhaust: str = "all",
    ) -> None:
        self._sources = [_Source(sizes, index, seed, shuffle) for index, sizes in enumerate(sources)]
        self._rates = rates_of(weights) if weights else self._own_counts()
        known = [source.total for source in self._sources if source.total is not None]
        # Fixed here, because sizes that become known later must not change how epochs are counted.
        self._epoch_size = epoch_size(known, weights, exhaust) if len(known) == len(sources) else None

    @property
    def epoch_size(self) -> int | None:
        """Positions of one epoch; None if it has no end, or if not all sizes were known from the start."""
        return self._epoch_size

    def epoch(self, position: int) -> int:
        """Return the epochs completed at a position; without epochs, the passes over the first source.

        Reads only sizes of shards before the position.
        """
        if self.epoch_size is not None:
            return position // self.epoch_size
        return self._sources[0].passes_completed(counts_before(position, self._rates)[0])

    def locate(self, positions: Ints) -> SequenceIds:
        """Return the sequences at some positions. Positions continue across epochs."""
        source, used = split(positions, self._rates)
        found = np.zeros((3, len(positions)), np.int64)
        for index in np.unique(source).tolist():
            mine = np.flatnonzero(source == index)
            found[:, mine] = self._sources[index].locate(used[mine])
        return SequenceIds(source, *found)

    def at(self, position: int) -> SequenceId:
        """Return the sequence at one position."""
        return next(iter(self.locate(np.array([position]))))

    def windows(self, position: int) -> list[tuple[tuple[int, int], Ints]]:
        """Return for each source the last window used before a position and the window after it, to fetch them early.

        Reads only sizes of shards before the position.

        Returns:
            For each source: a name of the window, and the shards of both windows.
        """
        counts = counts_before(position, self._rates)
        return [source.windows(count) for source, count in zip(self._sources, counts, strict=True)]

    def _own_counts(self) -> list[int]:
        totals = [source.total for source in self._sources]
        if len(totals) == 1:
            return [totals[0] or 1]
        # config/rules.py refuses this case: it requires weights.
        assert all(total is not None for total in totals), "several sources of unknown size need weights"
        return [total or 0 for total in totals]


class _Layout:
    """The order of the shards of one pass, and the first index of each shard, as far as sizes are known."""

    def __init__(self, shards: Ints) -> None:
        self.shards = shards
        self.num_known = 0
        self._starts = np.zeros(len(shards) + 1, np.int64)

    @property
    def starts(self) -> Ints:
        """First index of each known shard, and the end."""
        return self._starts[: self.num_known + 1]

    @property
    def next_window(self) -> Ints:
        """Shards of the first window with unknown sizes."""
        return self.shards[self.num_known : self.num_known + WINDOW_SHARDS]

    def extend(self, sizes: Ints) -> None:
        """Add the sizes of the next shards."""
        end = self.num_known + len(sizes)
        self._starts[self.num_known + 1 : end + 1] = self._starts[self.num_known] + np.cumsum(sizes)
        self.num_known = end  # last: another thread may be reading

    def window(self, index: Ints) -> Ints:
        """Return the window of each index."""
        return np.searchsorted(self.starts[::WINDOW_SHARDS], index, side="right") - 1


class _Source:
    """The order of one source: maps the number of sequences taken before to (pass, shard, row)."""

    def __init__(self, sizes: Ints | ShardSizes, index: int, seed: int, shuffle: bool) -> None:
        self._late = None if isinstance(sizes, np.ndarray) else sizes
        num_shards = len(sizes) if isinstance(sizes, np.ndarray) else sizes.num_shards
        self._sizes = sizes if isinstance(sizes, np.ndarray) else np.zeros(num_shards, np.int64)
        self._index, self._shuffle = index, shuffle
        # Rows of one window are mixed anyway, so with one window all passes have one layout.
        self._has_layouts = shuffle and num_shards > WINDOW_SHARDS
        self._key = hash_of(seed, index)
        self._layouts: dict[int, _Layout] = {}
        self._first = _Layout(self.shards_of(0) if self._late is not None else self._sizes[:0])
        self._lock = Lock()
        self.total: int | None = None if self._late is not None else self._checked(int(self._sizes.sum()))

    def locate(self, used: Ints) -> Ints:
        """Return pass, shard and row of each sequence, as three rows."""
        total = self._reach(int(used.max()))
        passes, index = np.divmod(used, total) if total else (np.zeros_like(used), used)
        keys = absorb(self._key, passes)
        groups = passes if self._has_layouts else np.zeros_like(passes)
        found = np.stack([passes, passes, passes])
        for group in np.unique(groups).tolist():
            mine = np.flatnonzero(groups == group)
            found[1:, mine] = self._in_pass(self._layout(group), index[mine], keys[mine])
        return found

    def passes_completed(self, count: int) -> int:
        """Return the number of complete passes over the source after `count` sequences."""
        total = self._reach(count - 1)
        return count // total if total else 0

    def windows(self, count: int) -> tuple[tuple[int, int], Ints]:
        """See `Order.windows`."""
        if count == 0:
            return (0, 0), self.shards_of(0)[: 2 * WINDOW_SHARDS]
        total = self._reach(count - 1)
        passed, index = divmod(count - 1, total) if total else (0, count - 1)
        layout = self._layout(passed if self._has_layouts else 0)
        window = int(layout.window(np.array([index]))[0])
        shards = layout.shards[window * WINDOW_SHARDS : (window + 2) * WINDOW_SHARDS]
        if self._has_layouts and len(shards) <= WINDOW_SHARDS:
            shards = np.append(shards, self.shards_of(passed + 1)[:WINDOW_SHARDS])
        return (passed, window), shards

    def _in_pass(self, layout: _Layout, index: Ints, keys: Words) -> tuple[Ints, Ints]:
        """Return shard and row of the indexes of one layout."""
        starts = layout.starts
        place = index
        if self._shuffle:
            window = layout.window(index)
            first = window * WINDOW_SHARDS
            begin = starts[first]
            size = starts[np.minimum(first + WINDOW_SHARDS, layout.num_known)] - begin
            place = begin + permute(index - begin, size, absorb(absorb(keys, 1), window))
        slot = np.searchsorted(starts, place, side="right") - 1
        return layout.shards[slot], place - starts[slot]

    def _layout(self, passed: int) -> _Layout:
        if self._late is not None and passed == 0:
            return self._first
        layout = self._layouts.get(passed)
        if layout is None:
            layout = _Layout(self.shards_of(passed))
            layout.extend(self._sizes[layout.shards])
            while len(self._layouts) >= _MAX_LAYOUTS:
                self._layouts.pop(next(iter(self._layouts)), None)
            self._layouts[passed] = layout
        return layout

    def shards_of(self, passed: int) -> Ints:
        """Return the shards in the order of a pass."""
        shards = np.arange(len(self._sizes))
        if not self._has_layouts:
            return shards
        return permute(shards, len(shards), absorb(absorb(self._key, passed), 0))

    def _reach(self, index: int) -> int | None:
        """Read sizes until they cover an index. Returns the sequences of a pass, or None until all are known."""
        if self.total is not None or self._late is None or index < self._first.starts[-1]:
            return self.total
        with self._lock:
            while index >= self._first.starts[-1] and self._first.num_known < len(self._sizes):
                members = self._first.next_window
                self._sizes[members] = self._late.num_sequences(members)
                self._first.extend(self._sizes[members])
            if self._first.num_known == len(self._sizes):
                self.total = self._checked(int(self._first.starts[-1]))
        return self.total

    def _checked(self, total: int) -> int:
        if total == 0 and self._late is not None:
            raise DataError(f"data.train.{self._index}: none of its {len(self._sizes)} shards has a sequence")
        return total


def first_pass(num_shards: int, seed: int, source: int, shuffle: bool) -> list[int]:
    """Return the shards of a source in the order of its first pass."""
    shards: list[int] = _Source(np.zeros(num_shards, np.int64), source, seed, shuffle).shards_of(0).tolist()
    return shards


def step_positions(step: int, global_batch_size: int, total: int) -> range:
    """Return the positions of step `step` (counted from 0); the last step takes the remaining positions."""
    return range(min(step * global_batch_size, total), min((step + 1) * global_batch_size, total))


def run_length(
    epoch_positions: int | None, global_batch_size: int, epochs: float, max_steps: int | None
) -> tuple[int, int]:
    """Return `(steps, positions)` of a run. No sequence is dropped, and none is repeated to fill the last step.

    Args:
        epoch_positions: Positions of an epoch; None means unknown, which requires `max_steps`.
        global_batch_size: `train.global_batch_size`.
        epochs: `train.epochs`.
        max_steps: `train.max_steps`.
    """
    if max_steps is not None:
        return max_steps, max_steps * global_batch_size
    assert epoch_positions is not None, "config/rules.py asks for train.max_steps"
    total = max(1, round(epochs * epoch_positions))
    return -(-total // global_batch_size), total


def digest(ids: SequenceIds) -> str:
    """Return a digest of the sequences of a step, independent of their order. It proves what was consumed."""
    state = np.zeros(1, np.uint64)
    for values in (ids.source, ids.pass_index, ids.shard, ids.row):
        state = absorb(state, values)
    return f"{int(state.sum(dtype=np.uint64)) if len(ids) else 0:016x}"
