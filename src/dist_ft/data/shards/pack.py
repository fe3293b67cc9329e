"""Joins short samples into sequences. Pure: the same samples give the same sequences.

Packing looks at one window of rows at a time, inside one token shard, so a packed sequence does not depend on the rest
of the data set.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
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
        numbers: By column, the number of each sample.
    """

    input_ids: list[int]
    trained: list[bool]
    starts: list[int]
    numbers: dict[str, list[float]] = field(default_factory=dict)


class Window:
    """Collects the samples of one window until they are packed, at five bytes a token (lists would take fifty).

    Args:
        samples: The first samples.
        columns: Names of the columns of numbers that each sample has.
    """

    def __init__(self, samples: Iterable[Sample] = (), columns: Sequence[str] = ()) -> None:
        self._input_ids = array("i")
        self._trained = bytearray()
        self._ends = [0]
        self._numbers = {name: array("d") for name in columns}
        for sample in samples:
            self.add(sample)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def add(self, sample: Sample) -> None:
        """Add a sample."""
        self._input_ids.extend(sample.input_ids)
        self._trained.extend(sample.trained)
        self._ends.append(len(self._input_ids))
        for name, values in self._numbers.items():
            values.append(sample.numbers[name])

    def sample(self, number: int) -> Sample:
        """Return a sample."""
        start, end = self._ends[number : number + 2]
        flags = cast("list[bool]", memoryview(self._trained).cast("?")[start:end].tolist())
        numbers = {name: values[number] for name, values in self._numbers.items()}
        return Sample(self._input_ids[start:end].tolist(), flags, numbers)

    def with_mismatched(self, seq_len: int) -> Window:
        """Return a window in which each sample is followed by its prompt with the answer of the sample before.

        The first sample gets the answer of the last. Numbers are those of the sample itself.

        Args:
            seq_len: The most tokens of a sample; longer ones are cut at the end.
        """
        window = Window(columns=tuple(self._numbers))
        answer: list[int] = []
        for number in [len(self) - 1, *range(len(self))] if len(self) else ():
            sample = self.sample(number)
            border = sample.trained.index(True)
            if answer:
                ids = [*sample.input_ids[:border], *answer][:seq_len]
                window.add(sample)
                window.add(replace(sample, input_ids=ids, trained=[i >= border for i in range(len(ids))]))
            answer = sample.input_ids[border:]
        return window

    def sequences(self, seq_len: int, packing: bool, samples_per_slot: int = 1) -> Iterator[PackedSequence]:
        """Yield the sequences. Each is made on demand.

        Args:
            seq_len: The most tokens of a sample.
            packing: Join as many slots as fit into `samples_per_slot` samples of that length. If False, a sequence is
                one slot.
            samples_per_slot: Neighbours that stay together.
        """
        ends = self._ends[::samples_per_slot]
        slots = (
            plan_bins([end - start for start, end in pairwise(ends)], seq_len * samples_per_slot)
            if packing
            else [[slot] for slot in range(len(ends) - 1)]
        )
        for members in slots:
            firsts = (slot * samples_per_slot for slot in members)
            yield self._join([first + offset for first in firsts for offset in range(samples_per_slot)])

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
        numbers = {name: [values[number] for number in members] for name, values in self._numbers.items()}
        return PackedSequence(input_ids, trained, starts, numbers)


def plan_bins(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return bins of samples, filled by best fit decreasing; bins and their members are in input order."""
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
