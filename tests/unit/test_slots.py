"""Slots of a global batch over micro steps and ranks."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_ft.slots import layout_slots, num_micro_steps, round_up

LENGTHS = st.lists(st.integers(1, 512), max_size=40)
MICRO_BATCH = st.integers(1, 6)
WORLD_SIZE = st.integers(1, 7)


@pytest.mark.parametrize(
    ("num_slots", "micro_batch_size", "world_size", "steps"),
    [(8, 2, 2, 2), (5, 1, 2, 3), (1, 1, 1, 1), (1, 4, 4, 1), (16, 4, 4, 1), (17, 4, 4, 2), (12, 5, 1, 3)],
)
def test_micro_steps_are_the_fewest_that_hold_every_slot(
    num_slots: int, micro_batch_size: int, world_size: int, steps: int
) -> None:
    assert num_micro_steps(num_slots, micro_batch_size, world_size) == steps


def test_the_worked_example_of_the_module() -> None:
    assert layout_slots([5, 4, 3, 2, 1], 1, 2) == [[[0], [1]], [[2], [3]], [[4], []]]


@settings(deadline=None)
@given(LENGTHS, MICRO_BATCH, WORLD_SIZE)
def test_every_slot_has_exactly_one_place(lengths: list[int], micro_batch_size: int, world_size: int) -> None:
    layout = layout_slots(lengths, micro_batch_size, world_size)
    places = [slot for ranks in layout for slots in ranks for slot in slots]
    assert sorted(places) == list(range(len(lengths)))


@settings(deadline=None)
@given(LENGTHS, MICRO_BATCH, WORLD_SIZE, st.integers(0, 20))
def test_every_rank_runs_the_same_number_of_micro_steps(
    lengths: list[int], micro_batch_size: int, world_size: int, padding: int
) -> None:
    num_slots = len(lengths) + padding
    layout = layout_slots(lengths, micro_batch_size, world_size, num_slots)
    assert len(layout) == num_micro_steps(num_slots, micro_batch_size, world_size)
    assert all(len(ranks) == world_size for ranks in layout)
    assert all(len(slots) <= micro_batch_size for ranks in layout for slots in ranks)


@settings(deadline=None)
@given(LENGTHS, MICRO_BATCH, WORLD_SIZE)
def test_long_rows_come_first_and_rows_of_a_pass_are_alike(
    lengths: list[int], micro_batch_size: int, world_size: int
) -> None:
    layout = layout_slots(lengths, micro_batch_size, world_size)
    passes = [[lengths[slot] for slots in ranks for slot in slots] for ranks in layout]
    assert all(min(now) >= max(after) for now, after in itertools.pairwise(passes) if after)


@settings(deadline=None)
@given(LENGTHS, MICRO_BATCH, WORLD_SIZE)
def test_ranks_of_a_pass_differ_by_one_row_at_most(lengths: list[int], micro_batch_size: int, world_size: int) -> None:
    for ranks in layout_slots(lengths, micro_batch_size, world_size):
        counts = [len(slots) for slots in ranks]
        assert max(counts) - min(counts) <= 1


def test_equal_lengths_are_dealt_by_slot() -> None:
    assert layout_slots([7] * 6, 3, 2) == [[[0, 2, 4], [1, 3, 5]]]


def test_a_partial_step_has_as_many_passes_as_a_full_one() -> None:
    assert layout_slots([3], 2, 2, num_slots=8) == [[[0], []], [[], []]]


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 1000))
def test_round_up_is_the_next_multiple(value: int, multiple: int) -> None:
    rounded = round_up(value, multiple)
    assert rounded % multiple == 0
    assert value <= rounded < value + multiple
