"""Packing: every sample once, never over the limit, the same every time."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_ft.data.shards.pack import PackedSequence, Window, plan_bins
from dist_ft.records import Sample

CAPACITY = 16
LENGTHS = st.lists(st.integers(1, CAPACITY), max_size=40)


def packed(samples: list[Sample], seq_len: int, packing: bool) -> list[PackedSequence]:
    return list(Window(samples).sequences(seq_len, packing))


def make_samples(lengths: list[int]) -> list[Sample]:
    """Samples whose tokens are all different, every token trained, the first included."""
    tokens = itertools.count(1)
    return [Sample(list(itertools.islice(tokens, length)), [True] * length) for length in lengths]


def split(sequence: PackedSequence) -> list[list[int]]:
    ends = [*sequence.starts[1:], len(sequence.input_ids)]
    return [sequence.input_ids[start:end] for start, end in zip(sequence.starts, ends, strict=True)]


@settings(deadline=None)
@given(LENGTHS, st.booleans())
def test_every_sample_is_in_exactly_one_sequence(lengths: list[int], packing: bool) -> None:
    samples = make_samples(lengths)
    found = [part for sequence in packed(samples, CAPACITY, packing) for part in split(sequence)]
    assert sorted(found) == [sample.input_ids for sample in samples]


@settings(deadline=None)
@given(LENGTHS)
def test_no_sequence_is_longer_than_the_limit(lengths: list[int]) -> None:
    sequences = packed(make_samples(lengths), CAPACITY, packing=True)
    assert all(0 < len(sequence.input_ids) <= CAPACITY for sequence in sequences)


@settings(deadline=None)
@given(LENGTHS)
def test_no_two_sequences_would_fit_into_one(lengths: list[int]) -> None:
    sizes = sorted(len(s.input_ids) for s in packed(make_samples(lengths), CAPACITY, packing=True))
    assert len(sizes) < 2 or sizes[0] + sizes[1] > CAPACITY


@settings(deadline=None)
@given(LENGTHS, st.booleans())
def test_the_first_token_of_each_sample_is_never_trained(lengths: list[int], packing: bool) -> None:
    for sequence in packed(make_samples(lengths), CAPACITY, packing):
        untrained = [place for place, trained in enumerate(sequence.trained) if not trained]
        assert untrained == sequence.starts
        assert len(sequence.trained) == len(sequence.input_ids)


def test_the_mask_travels_with_its_sample() -> None:
    samples = [Sample([1, 2, 3], [False, False, True]), Sample([4, 5], [False, True])]
    assert packed(samples, 8, packing=True) == [
        PackedSequence([1, 2, 3, 4, 5], [False, False, True, False, True], [0, 3])
    ]


@settings(deadline=None)
@given(LENGTHS)
def test_the_same_samples_give_the_same_sequences(lengths: list[int]) -> None:
    samples = make_samples(lengths)
    assert packed(samples, CAPACITY, packing=True) == packed(list(samples), CAPACITY, packing=True)


def test_packing_leaves_the_samples_alone() -> None:
    samples = make_samples([3, 3])
    packed(samples, CAPACITY, packing=True)
    assert samples == make_samples([3, 3])


@settings(deadline=None)
@given(LENGTHS)
def test_without_packing_a_sequence_is_a_sample_in_order(lengths: list[int]) -> None:
    samples = make_samples(lengths)
    sequences = packed(samples, CAPACITY, packing=False)
    assert [s.input_ids for s in sequences] == [sample.input_ids for sample in samples]
    assert all(s.starts == [0] for s in sequences)


def test_samples_of_one_slot_are_packed_together() -> None:
    samples = make_samples([3, 9, 16, 12, 1, 2, 2, 2])
    found = list(Window(samples).sequences(CAPACITY, packing=True, samples_per_slot=2))
    slots = [tuple(sample.input_ids for sample in samples[first : first + 2]) for first in range(0, 8, 2)]
    packed_slots = [tuple(map(list, pair)) for s in found for pair in zip(split(s)[::2], split(s)[1::2], strict=True)]
    assert sorted(packed_slots) == sorted(slots)
    assert len(found) < 4  # two samples of CAPACITY tokens have room for more than one short pair
    assert all(len(s.input_ids) <= 2 * CAPACITY for s in found)


def test_the_mismatched_answer_is_that_of_the_sample_before() -> None:
    samples = [
        Sample([1, 2, 3], [False, False, True], {"label": 1.0}),
        Sample([4, 5, 6], [False, True, True], {"label": 0.0}),
        Sample([7, 8, 9, 10], [False, False, False, True], {"label": 1.0}),
    ]
    window = Window(samples, ["label"]).with_mismatched(seq_len=4)
    found = [window.sample(number) for number in range(len(window))]
    assert found[::2] == samples
    assert found[1::2] == [
        Sample([1, 2, 10], [False, False, True], {"label": 1.0}),  # the first takes the last one's
        Sample([4, 3], [False, True], {"label": 0.0}),
        Sample([7, 8, 9, 5], [False, False, False, True], {"label": 1.0}),  # cut at seq_len
    ]


def test_samples_of_one_slot_are_one_sequence() -> None:
    samples = make_samples([3, 9, 16, 12])
    pairs = list(Window(samples).sequences(CAPACITY, packing=False, samples_per_slot=2))
    assert [split(pair) for pair in pairs] == [
        [samples[0].input_ids, samples[1].input_ids],
        [samples[2].input_ids, samples[3].input_ids],
    ]


@pytest.mark.parametrize(
    ("lengths", "bins"),
    [
        ([], []),
        ([16], [[0]]),
        ([1, 16, 15], [[0, 2], [1]]),
        ([8, 8, 8], [[0, 1], [2]]),
        ([4, 10, 12, 6], [[0, 2], [1, 3]]),  # best fit: each long one finds the rest that fills it
        ([9, 9, 9], [[0], [1], [2]]),
    ],
)
def test_bins_are_filled_best_fit_and_come_back_in_input_order(lengths: list[int], bins: list[list[int]]) -> None:
    assert plan_bins(lengths, CAPACITY) == bins
