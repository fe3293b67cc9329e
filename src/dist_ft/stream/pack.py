"""Joins short samples into sequences. Pure: the same samples give the same sequences.

Packing looks at one window of rows only (a token shard), so a packed sequence has an identity that does not
depend on what else is in the data set.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

from dist_ft.records import Sample


@dataclass(frozen=True)
class PackedSequence:
    """One row of training data.

    Attributes:
        input_ids: Tokens of all samples, one after the other.
        trained: As in `Sample`.
        starts: Where each sample begins.
    """

    input_ids: list[int]
    trained: list[bool]
    starts: list[int]


def pack(samples: Sequence[Sample], seq_len: int, packing: bool) -> list[PackedSequence]:
    """Returns the sequences of one window; without packing, one a sample."""
    bins = plan_bins([len(s.input_ids) for s in samples], seq_len) if packing else [[i] for i in range(len(samples))]
    return [_join([samples[i] for i in members]) for members in bins]


def plan_bins(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Places samples into bins by best fit decreasing; bins and members come back in input order."""
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


def _join(samples: Sequence[Sample]) -> PackedSequence:
    input_ids: list[int] = []
    trained: list[bool] = []
    starts: list[int] = []
    for sample in samples:
        starts.append(len(input_ids))
        input_ids += sample.input_ids
        trained += [False, *sample.trained[1:]]
    return PackedSequence(input_ids, trained, starts)
