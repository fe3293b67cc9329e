"""Which sequence stands at which position of the stream: a pure function of (shards, rates, seed, position).

World size, node and attempt do not appear here; that is what makes a resume at any size exact. Nothing is
replayed: locating a position costs the same at the first and at the billionth sequence. Torch-free.

Worked example. Two sources of 6 and 3 sequences without weights make epochs of 9 positions. `mixing` gives each
source its share at a steady rate (B A A B A A B A A), and each source walks through its own permutation: shards in
a seeded order, rows permuted inside a window of neighbouring shards, so that a reader touches few files at a time.

The sizes of a window's shards are asked for when the window is reached, never before. A run whose data is still
being prepared therefore sees the same sequences as one whose data lies ready.
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
"""Passes over a source whose layouts are kept: a batch may reach into the next."""


class ShardSizes(Protocol):
    """Sizes of shards that may not be ready yet."""

    @property
    def num_shards(self) -> int:
        """Shards of the source."""
        ...

    def num_sequences(self, shards: Ints) -> Ints:
        """Returns the sequences of some shards; may wait until they are ready."""
        ...


@dataclass(frozen=True)
class SequenceId:
    """Names one use of one sequence, for ever.

    Attributes:
        source: Index of the source in `data.train`.
        pass_index: How often the source had been used up before.
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
    """The stream of a run. Its state is the position; what it keeps only saves work.

    Args:
        sources: Sizes of each source's shards, in config order: an array where all are known.
        weights: `DataConfig.weights`. Without them sources share by their sizes, which must then be known unless
            there is one only.
        seed: `run.seed`.
        shuffle: `data.shuffle`; False takes shards and rows as they come.
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
        # Settled here: what becomes known later must not change how epochs are counted.
        self._epoch_size = epoch_size(known, weights, exhaust) if len(known) == len(sources) else None

    @property
    def epoch_size(self) -> int | None:
        """Positions of one epoch; None where it has no end, or not all sizes were known from the start."""
        return self._epoch_size

    def epoch(self, position: int) -> int:
        """Returns the epochs completed at a position; without epochs, the passes over the first source.

        Asks for no sizes beyond those of what stands before the position.
        """
        if self.epoch_size is not None:
            return position // self.epoch_size
        return self._sources[0].passes_completed(counts_before(position, self._rates)[0])

    def locate(self, positions: Ints) -> SequenceIds:
        """Returns the sequences at some positions, which count on across epochs."""
        source, used = split(positions, self._rates)
        found = np.zeros((3, len(positions)), np.int64)
        for index in np.unique(source).tolist():
            mine = np.flatnonzero(source == index)
            found[:, mine] = self._sources[index].locate(used[mine])
        return SequenceIds(source, *found)

    def at(self, position: int) -> SequenceId:
        """Returns the sequence at one position."""
        return next(iter(self.locate(np.array([position]))))

    def windows(self, position: int) -> list[tuple[tuple[int, int], Ints]]:
        """Returns of each source the window last used before a position, and the one after: where reading will be.

        Asks for no sizes beyond those of what stands before the position.

        Returns:
            A source each: a name of the window, and the shards of both.
        """
        counts = counts_before(position, self._rates)
        return [source.windows(count) for source, count in zip(self._sources, counts, strict=True)]

    def _own_counts(self) -> list[int]:
        totals = [source.total for source in self._sources]
        if len(totals) == 1:
            return [totals[0] or 1]
        # config/rules.py asks for weights before it comes to this.
        assert all(total is not None for total in totals), "several sources of unknown size need weights"
        return [total or 0 for total in totals]


class _Layout:
    """Where the shards of one pass lie: their order, and the first index of each as far as sizes are known."""

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
        """Shards of the first window whose sizes are not known."""
        return self.shards[self.num_known : self.num_known + WINDOW_SHARDS]

    def extend(self, sizes: Ints) -> None:
        """Takes the sizes of the next shards."""
        end = self.num_known + len(sizes)
        self._starts[self.num_known + 1 : end + 1] = self._starts[self.num_known] + np.cumsum(sizes)
        self.num_known = end  # last: another thread may be reading

    def window(self, index: Ints) -> Ints:
        """Returns the window in which each index lies."""
        return np.searchsorted(self.starts[::WINDOW_SHARDS], index, side="right") - 1


class _Source:
    """One source's own walk: (how many were taken before) → (pass, shard, row)."""

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
        """Returns pass, shard and row of each, as three rows."""
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
        """Returns how often the source has been used up after `count` sequences."""
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
        """Returns shard and row of the indexes of one layout."""
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
        """Returns the shards in the order of a pass."""
        shards = np.arange(len(self._sizes))
        if not self._has_layouts:
            return shards
        return permute(shards, len(shards), absorb(absorb(self._key, passed), 0))

    def _reach(self, index: int) -> int | None:
        """Learns sizes until an index is covered. Returns the sequences of a pass once one has been used up."""
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
    """Returns the shards of a source in the order of its first pass."""
    shards: list[int] = _Source(np.zeros(num_shards, np.int64), source, seed, shuffle).shards_of(0).tolist()
    return shards


def step_positions(step: int, global_batch_size: int, total: int) -> range:
    """Returns the positions that step `step` (counted from 0) takes; the last step takes what is left."""
    return range(min(step * global_batch_size, total), min((step + 1) * global_batch_size, total))


def run_length(
    epoch_positions: int | None, global_batch_size: int, epochs: float, max_steps: int | None
) -> tuple[int, int]:
    """Returns `(steps, positions)` of a run; nothing is dropped and nothing repeated to fill up.

    Args:
        epoch_positions: Positions of an epoch; None, where it is not known, needs `max_steps`.
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
    """Returns the commutative digest of the sequences of a step: the proof of what was consumed."""
    state = np.zeros(1, np.uint64)
    for values in (ids.source, ids.pass_index, ids.shard, ids.row):
        state = absorb(state, values)
    return f"{int(state.sum(dtype=np.uint64)) if len(ids) else 0:016x}"
