"""Permutations on arrays, against the same thing said in plain integers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_ft.data.stream.permute import absorb, hash_of, permute

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
KEYS = st.integers(0, MASK)


def plain_absorb(state: int, value: int) -> int:
    state = (state ^ value) + GOLDEN & MASK
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & MASK
    state = (state ^ state >> 27) * 0x94D049BB133111EB & MASK
    return state ^ state >> 31


def plain_permute(index: int, size: int, key: int) -> int:
    bits = max(2, (size - 1).bit_length())
    num_low = bits // 2
    num_high = bits - num_low
    while True:
        high, low = index >> num_low, index & (1 << num_low) - 1
        for number in range(4):
            half = high if number % 2 else low
            mixed = half * 0xFF51AFD7ED558CCD + key + number * GOLDEN & MASK
            mixed = (mixed ^ mixed >> 32) * 0xC4CEB9FE1A85EC53 & MASK
            mixed = (mixed ^ mixed >> 29) * GOLDEN & MASK
            if number % 2:
                low ^= mixed >> 64 - num_low
            else:
                high ^= mixed >> 64 - num_high
        index = high << num_low | low
        if index < size:
            return index


def key_array(*keys: int) -> np.ndarray:
    return np.array(keys, np.uint64)


def test_it_is_a_permutation_for_every_small_size() -> None:
    for size in range(1, 301):
        assert sorted(permute(np.arange(size), size, key_array(MASK - size))) == list(range(size))


@pytest.mark.parametrize("key", [0, 1, 2**63, MASK])
def test_it_is_a_permutation_over_several_blocks(key: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(50_001), 50_001, key_array(key))), np.arange(50_001))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 2**50), KEYS, st.floats(0, 1, exclude_max=True)), min_size=1, max_size=20))
def test_arrays_of_sizes_and_keys_give_what_plain_integers_do(cases: list[tuple[int, int, float]]) -> None:
    indexes = [int(size * part) for size, _, part in cases]
    sizes, keys = [size for size, _, _ in cases], [key for _, key, _ in cases]
    found = permute(np.array(indexes), np.array(sizes), key_array(*keys))
    assert found.tolist() == [plain_permute(i, s, k) for i, s, k in zip(indexes, sizes, keys, strict=True)]


@given(st.lists(st.integers(0, 2**63 - 1), max_size=5))
def test_the_hash_is_that_of_plain_integers(values: list[int]) -> None:
    state = 0
    for value in values:
        state = plain_absorb(state, value)
    assert hash_of(*values).tolist() == [state]


@given(KEYS, st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=5))
def test_many_values_are_hashed_each_for_itself(state: int, values: list[int]) -> None:
    assert absorb(key_array(state), np.array(values)).tolist() == [plain_absorb(state, value) for value in values]


def test_small_permutations_reach_every_place() -> None:
    """Of three things each lands on each place about a third of the time."""
    places = np.array([permute(np.arange(3), 3, hash_of(seed)) for seed in range(900)])
    counts = [[int((places[:, item] == place).sum()) for place in range(3)] for item in range(3)]
    assert all(240 < count < 360 for row in counts for count in row)
