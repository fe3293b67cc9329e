"""How sources share the stream: steadily, exactly, and by the weights alone."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_ft.data.stream.mixing import RATE_TOTAL, counts_before, epoch_size, rates_of, split

RATES = st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(any)
WEIGHTS = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6)


@settings(deadline=None)
@given(RATES)
def test_every_prefix_is_mixed_in_proportion(rates: list[int]) -> None:
    """A source is less than one sequence behind its exact share, and ahead by less than the sum below.

    Source k gets floor(R · s / r) of what its predecessors left, where r is the rate of k and all after it.
    Each predecessor leaves up to one too many, scaled down by those that follow: s · (1/r_1 + … + 1/r_k).
    For two sources that is one; in general no more than k.
    """
    total = sum(rates)
    rest = [sum(rates[k:]) for k in range(len(rates))]
    source, used = split(np.arange(total), rates)
    for position in range(total + 1):
        counts = counts_before(position, rates)
        assert counts == np.bincount(source[:position], minlength=len(rates)).tolist()
        if position < total:
            assert used[position] == counts[source[position]]
        for k, rate in enumerate(rates):
            ahead = counts[k] - Fraction(position * rate, total)
            most = rate * sum((Fraction(1, r) for r in rest[1 : k + 1] if r), Fraction(0))
            assert -1 < ahead <= most <= k
    assert counts_before(total, rates) == rates


@settings(deadline=None)
@given(RATES, st.integers(0, 10**12), st.integers(1, 40))
def test_later_periods_go_on_counting(rates: list[int], start: int, count: int) -> None:
    source, used = split(np.arange(start, start + count), rates)
    for offset in range(count):
        before, after = (counts_before(start + offset + extra, rates) for extra in (0, 1))
        taken = [b - a for a, b in zip(before, after, strict=True)]
        assert taken == [int(k == source[offset]) for k in range(len(rates))]
        assert used[offset] == before[source[offset]]


@pytest.mark.parametrize("rates", [[5 * 10**9, 3], [7 * 10**9, 6 * 10**9, 5 * 10**9], [5 * 10**9]])
def test_billions_of_sequences_do_not_overflow(rates: list[int]) -> None:
    start = sum(rates) - 30
    source, used = split(np.arange(start, start + 60), rates)
    for offset in range(60):
        assert used[offset] == counts_before(start + offset, rates)[source[offset]]
    assert counts_before(sum(rates), rates) == rates


@settings(deadline=None)
@given(WEIGHTS)
def test_rates_follow_the_weights_within_one(weights: list[float]) -> None:
    rates, whole = rates_of(weights), sum(map(Fraction, weights))
    assert sum(rates) == RATE_TOTAL
    assert all(abs(r - RATE_TOTAL * Fraction(w) / whole) < 1 for r, w in zip(rates, weights, strict=True))


@pytest.mark.parametrize("weights", [[1e308, 1e308], [5e-324, 5e-324], [2**1000, 2**1000]])
def test_extreme_weights_are_exact(weights: list[float]) -> None:
    assert rates_of(weights) == [RATE_TOTAL // 2, RATE_TOTAL // 2]


# Epochs


def walk(sizes: list[int], weights: list[float], exhaust: str) -> int:
    """The length of an epoch by going through it."""
    rates, counts, position = rates_of(weights), [0] * len(sizes), 0
    while exhaust == "first" or any(count < size for count, size in zip(counts, sizes, strict=True)):
        taken = int(split(np.array([position]), rates)[0][0])
        if exhaust == "first" and counts[taken] == sizes[taken]:
            break
        counts[taken] += 1
        position += 1
    return position


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.sampled_from([0.3, 1.0, 2.0, 5.5])), min_size=1, max_size=4),
    st.sampled_from(["first", "all"]),
)
def test_the_length_of_an_epoch_is_what_walking_gives(sources: list[tuple[int, float]], exhaust: str) -> None:
    sizes, weights = [size for size, _ in sources], [weight for _, weight in sources]
    assert epoch_size(sizes, weights, exhaust) == walk(sizes, weights, exhaust)


@pytest.mark.parametrize(
    ("sizes", "weights", "exhaust", "expected"),
    [
        ([6, 3], None, "all", 9),
        ([10], [0.5], "first", 10),
        ([10], [0.5], "all", 10),
        ([10, 10], [1.0, 1.0], "first", 20),
        ([10, 10], [1.0, 1.0], "all", 20),
        ([10, 2], [1.0, 1.0], "first", 4),
        ([10, 2], [1.0, 1.0], "all", 20),
        ([10, 2], [1.0, 1.0], "repeat", None),
        ([10**9, 10**7], [1.0, 1.0], "all", 2 * 10**9),
    ],
)
def test_epochs_written_out(sizes: list[int], weights: list[float] | None, exhaust: str, expected: int | None) -> None:
    found = epoch_size(sizes, weights, exhaust)
    assert found == expected or (found is not None and expected is not None and abs(found - expected) <= 1)
