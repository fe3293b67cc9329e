"""Joins short samples into sequences. Pure: the same samples give the same sequences.

Packing looks at one window of rows at a time, inside one token shard, so a packed sequence does not depend on the rest
of the data set.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

from dist_ft.records import Sample


@dataclass(frozen=True)
class PackedSequence:
    """One row of training data.

    Attributes:
        input_ids: Tokens of all samples, one after the other.
        trained: See `Sample`.
        starts: Index of the first token of each sample.
    """

    input_ids: list[int]
    trained: list[bool]
    starts: list[int]


class Window:
    """Collects the samples of one window until they are packed, at five bytes a token (lists would take fifty)."""

    def __init__(self, samples: Iterable[Sample] = ()) -> None:
        self._input_ids = array("i")
        self._trained = bytearray()
        self._ends = [0]
        for sample in samples:
            self.add(sample)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def add(self, sample: Sample) -> None:
        """Adds a sample."""
        self._input_ids.extend(sample.input_ids)
        self._trained.extend(sample.trained)
        self._ends.append(len(self._input_ids))

    def sequences(self, seq_len: int, packing: bool, samples_per_sequence: int = 1) -> Iterator[PackedSequence]:
        """Yields the sequences. Each is made on demand.

        Args:
            seq_len: The most tokens of a packed sequence.
            packing: Join as many samples as fit. If False, each sequence joins `samples_per_sequence` neighbours.
            samples_per_sequence: Samples of a sequence without packing.
        """
        lengths = [end - start for start, end in pairwise(self._ends)]
        if packing:
            bins = plan_bins(lengths, seq_len)
        else:
            firsts = range(0, len(lengths), samples_per_sequence)
            bins = [list(range(first, first + samples_per_sequence)) for first in firsts]
        for members in bins:
            yield self._join(members)

    def _join(self, members: Sequence[int]) -> PackedSequence:
        input_ids: list[int] = []
        trained: list[bool] = []
        starts: list[int] = []
        for number in members:
            start, end = self._ends[number : number + 2]
            starts.append(len(input_ids))
            input_ids += self._input_ids[start:end]
            if end > start:
                flags = memoryview(self._trained).cast("?")
                trained += [False, *cast("list[bool]", flags[start + 1 : end].tolist())]
        return PackedSequence(input_ids, trained, starts)


def plan_bins(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Returns bins of samples, filled by best fit decreasing; bins and their members are in input order."""
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens left, bin), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect_left(free, (lengths[index], -1))
        if at == len(free):
            left, target = capacity, len(bins)
            bins.append([])
        else:
            left, target = free.pop(at)
        bins[target].append(index)
        insort(free, (left - lengths[index], target))
    return sorted(sorted(members) for members in bins)
