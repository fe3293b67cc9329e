"""The order: a pure function that gives every sequence once a pass, whatever is asked first."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_ft.stream.order import (
    WINDOW_SHARDS,
    Order,
    SequenceId,
    SourceSpec,
    digest,
    permute,
    run_length,
    shares,
    step_positions,
)


def make_order(*sources: tuple[tuple[int, ...], int | None], seed: int = 0) -> Order:
    """An order over (shard sizes, share); share None takes every sequence once."""
    return Order(tuple(SourceSpec(sizes, sum(sizes) if share is None else share) for sizes, share in sources), seed)


def stream(order: Order, count: int, start: int = 0) -> list[SequenceId]:
    return [order.locate(position) for position in range(start, start + count)]


SEEDS = st.integers(0, 2**63 - 1)
SHARDS = st.lists(st.integers(1, 20), min_size=1, max_size=20).map(tuple)
ORDERS = st.builds(
    lambda sources, seed: make_order(*sources, seed=seed),
    st.lists(st.tuples(SHARDS, st.none() | st.integers(0, 60)), min_size=1, max_size=4).filter(
        lambda sources: any(share != 0 for _, share in sources)
    ),
    SEEDS,
)


def assert_every_pass_is_whole(order: Order, ids: list[SequenceId]) -> None:
    """Fails unless each source's sequences come pass by pass, each row once a pass."""
    for index, source in enumerate(order.sources):
        used = [i for i in ids if i.source == index]
        for pass_index, rows in itertools.groupby(used, lambda i: i.pass_index):
            seen = [i.row for i in rows]
            start = pass_index * source.num_sequences
            assert len(seen) == min(len(used) - start, source.num_sequences)
            assert len(set(seen)) == len(seen)
            assert set(seen) <= set(range(source.num_sequences))
        assert [i.pass_index for i in used] == [n // source.num_sequences for n in range(len(used))]


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
@pytest.mark.parametrize(
    "sources",
    [
        [((1,), None)],
        [((2,), None)],
        [((100,), None)],
        [((1,) * 30, None)],
        [((7, 1, 13, 2, 9, 4, 4, 8, 3, 21, 5), None)],
        [((6,), None), ((3,), None)],
        [((50, 50), None), ((1,), None), ((1, 1, 1), None)],
        [((0, 5, 0, 3), None)],
    ],
)
def test_an_epoch_without_weights_is_every_sequence_once(
    sources: list[tuple[tuple[int, ...], int | None]], seed: int
) -> None:
    order = make_order(*sources, seed=seed)
    for epoch in range(3):
        ids = stream(order, order.epoch_size, epoch * order.epoch_size)
        expected = {
            SequenceId(s, epoch, row) for s, spec in enumerate(order.sources) for row in range(spec.num_sequences)
        }
        assert set(ids) == expected
        assert len(ids) == len(expected)


@settings(deadline=None, max_examples=60)
@given(ORDERS, st.integers(1, 3))
def test_each_pass_over_a_source_takes_each_row_once(order: Order, epochs: int) -> None:
    ids = stream(order, epochs * order.epoch_size)
    assert len(set(ids)) == len(ids)
    assert_every_pass_is_whole(order, ids)
    taken = Counter(i.source for i in ids)
    assert all(taken[index] == epochs * source.share for index, source in enumerate(order.sources))


def test_a_repeated_source_starts_its_next_pass_inside_an_epoch() -> None:
    order = make_order(((4,), 10), ((20,), 10))
    ids = stream(order, 40)
    assert_every_pass_is_whole(order, ids)
    assert {i.pass_index for i in ids if i.source == 0} == {0, 1, 2, 3, 4}
    assert {i.pass_index for i in ids if i.source == 1} == {0}


def test_a_source_used_in_part_goes_on_where_it_stopped() -> None:
    order = make_order(((10,), 4))
    assert sorted(i.row for i in stream(order, 10)) == list(range(10))


def test_a_source_without_share_is_never_taken() -> None:
    assert {i.source for i in stream(make_order(((5,), 0), ((5,), None), ((5,), 0)), 20)} == {1}


@settings(deadline=None, max_examples=40)
@given(ORDERS, st.randoms(use_true_random=False))
def test_a_position_does_not_depend_on_what_was_asked_before(order: Order, rng: random.Random) -> None:
    positions = list(range(2 * order.epoch_size))
    forwards = stream(order, len(positions))
    rng.shuffle(positions)
    copy = Order(order.sources, order.seed)
    assert {p: copy.locate(p) for p in positions} == dict(enumerate(forwards))


def test_seed_and_pass_change_the_order() -> None:
    orders = [[i.row for i in stream(make_order(((30, 30), None), seed=seed), 120)] for seed in range(20)]
    passes = [tuple(rows[:60]) for rows in orders] + [tuple(rows[60:]) for rows in orders]
    assert len(set(passes)) == len(passes)


def test_equal_sources_are_shuffled_differently() -> None:
    ids = stream(make_order(((50,), None), ((50,), None)), 100)
    assert [i.row for i in ids if i.source == 0] != [i.row for i in ids if i.source == 1]


def test_the_order_is_well_mixed() -> None:
    """Neighbours stay neighbours about as often as in a random permutation (twice), not more."""
    rows = [i.row for i in stream(make_order(((1000,), None)), 1000)]
    assert sum(abs(a - b) == 1 for a, b in itertools.pairwise(rows)) < 12
    assert abs(sum(rows[:500]) / 500 - 499.5) < 4 * 1000 / math.sqrt(12 * 500)


def test_a_window_reads_few_shards() -> None:
    order = make_order(((5,) * (3 * WINDOW_SHARDS), None))
    windows = [stream(order, 5 * WINDOW_SHARDS, start) for start in range(0, 15 * WINDOW_SHARDS, 5 * WINDOW_SHARDS)]
    touched = [{i.row // 5 for i in ids} for ids in windows]
    assert [len(shards) for shards in touched] == [WINDOW_SHARDS] * 3
    assert set.union(*touched) == set(range(3 * WINDOW_SHARDS))


def test_the_order_never_changes_between_releases() -> None:
    """Another order under the same seed would make every resume across releases wrong."""
    order = make_order(((4, 2), None), ((3,), None), seed=7)
    ids = stream(order, 9)
    assert [i.source for i in ids] == [1, 0, 0, 1, 0, 0, 1, 0, 0]
    assert [i.row for i in ids] == [1, 2, 5, 2, 1, 4, 0, 0, 3]
    assert digest(ids) == "d6b71af8b68d4a7b"
    assert digest(stream(order, 8, 10**9)) == "81c37915b26a2096"


@pytest.mark.timeout(10)
def test_a_far_position_costs_what_a_near_one_does() -> None:
    order = make_order(((8192,) * 100, None), ((5000, 3), 700), seed=3)
    ids = stream(order, 2000, 10**12)
    assert len(set(ids)) == 2000
    assert all(type(value) is int for i in ids for value in (i.source, i.pass_index, i.row))
    assert all(0 <= i.row < order.sources[i.source].num_sequences for i in ids)


# Mixing


@settings(deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(any))
def test_every_prefix_of_an_epoch_is_mixed_in_proportion(share: list[int]) -> None:
    """A source is less than one sequence behind its exact share, and ahead by less than the sum below.

    Source k gets floor(R · s / r) of what its predecessors left, where r is the share of k and all after it.
    Each predecessor leaves up to one too many, scaled down by those that follow: s · (1/r_1 + … + 1/r_k).
    For two sources that is one; in general no more than k.
    """
    order = make_order(*(((100,), size) for size in share))
    total = sum(share)
    rest = [sum(share[k:]) for k in range(len(share))]
    counts = [0] * len(share)
    for position in range(total):
        counts[order.locate(position).source] += 1
        for k, size in enumerate(share):
            ahead = counts[k] - Fraction((position + 1) * size, total)
            most = size * sum((Fraction(1, r) for r in rest[1 : k + 1] if r), Fraction(0))
            assert ahead > -1
            assert ahead <= most
            assert most <= k
    assert counts == share


@pytest.mark.parametrize(
    ("sizes", "weights", "expected"),
    [
        ([6, 3], None, [6, 3]),
        ([6, 3], [1, 1], [5, 4]),
        ([6, 3], [2, 1], [6, 3]),
        ([6, 3], [0.2, 0.1], [6, 3]),
        ([10, 10, 10], [1, 1, 1], [10, 10, 10]),
        ([1, 1, 1], [5, 3, 1], [2, 1, 0]),
        ([100], [0.3], [100]),
        ([7, 0], [1, 1], [4, 3]),
    ],
)
def test_shares_are_divided_by_largest_remainder(
    sizes: list[int], weights: list[float] | None, expected: list[int]
) -> None:
    assert shares(sizes, weights) == expected


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 10**7), st.floats(1e-6, 1e6)), min_size=1, max_size=12),
)
def test_shares_keep_the_total_and_stay_within_one_of_exact(sources: list[tuple[int, float]]) -> None:
    sizes, weights = [s for s, _ in sources], [w for _, w in sources]
    result = shares(sizes, weights)
    assert sum(result) == sum(sizes)
    exact = [sum(sizes) * Fraction(w) / sum(map(Fraction, weights)) for w in weights]
    assert all(abs(got - want) < Fraction(1_000_001, 1_000_000) for got, want in zip(result, exact, strict=True))


# Steps


@settings(deadline=None)
@given(st.integers(1, 400), st.integers(1, 50), st.floats(0.01, 4), st.none() | st.integers(1, 30))
def test_the_steps_of_a_run_take_every_position_once(
    epoch_size: int, global_batch_size: int, epochs: float, max_steps: int | None
) -> None:
    steps, total = run_length(epoch_size, global_batch_size, epochs, max_steps)
    taken = [step_positions(step, global_batch_size, total) for step in range(steps)]
    assert list(itertools.chain.from_iterable(taken)) == list(range(total))
    assert all(len(positions) == global_batch_size for positions in taken[:-1])
    assert 1 <= len(taken[-1]) <= global_batch_size
    assert len(step_positions(steps, global_batch_size, total)) == 0


@pytest.mark.parametrize(
    ("epoch_size", "global_batch_size", "epochs", "max_steps", "expected"),
    [
        (10, 4, 1.0, None, (3, 10)),
        (10, 5, 1.0, None, (2, 10)),
        (10, 4, 2.5, None, (7, 25)),
        (10, 4, 0.3, None, (1, 3)),
        (10, 4, 0.001, None, (1, 1)),
        (10, 4, 0.001, 7, (7, 28)),
        (10, 4, 99.0, 1, (1, 4)),
    ],
)
def test_run_length(
    epoch_size: int, global_batch_size: int, epochs: float, max_steps: int | None, expected: tuple[int, int]
) -> None:
    assert run_length(epoch_size, global_batch_size, epochs, max_steps) == expected


# Digest and permutation


@settings(deadline=None)
@given(
    st.lists(st.builds(SequenceId, st.integers(0, 3), st.integers(0, 3), st.integers(0, 99)), max_size=12),
    st.data(),
)
def test_the_digest_does_not_depend_on_the_order(ids: list[SequenceId], data: st.DataObject) -> None:
    assert digest(data.draw(st.permutations(ids))) == digest(ids)


def test_the_digest_tells_apart_what_differs() -> None:
    near = [
        [], [SequenceId(0, 0, 1)], [SequenceId(0, 1, 0)], [SequenceId(1, 0, 0)], [SequenceId(0, 0, 10)],
        [SequenceId(0, 0, 1)] * 2, [SequenceId(0, 0, 1)] * 3, [SequenceId(0, 0, 1), SequenceId(0, 1, 0)],
        [SequenceId(1, 1, 1)], [SequenceId(11, 1, 1)], [SequenceId(1, 11, 1)], [SequenceId(1, 1, 11)],
    ]  # fmt: skip
    digests = [digest(ids) for ids in near]
    assert len(set(digests)) == len(digests)
    assert all(len(text) == 16 and int(text, 16) >= 0 for text in digests)


def test_permute_is_a_permutation_for_every_size() -> None:
    for size in range(1, 301):
        assert sorted(permute(i, size, 2**64 - size) for i in range(size)) == list(range(size))


@pytest.mark.parametrize("key", [0, 1, 2**63, 2**64 - 1])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 255, 256, 257])
def test_permute_is_a_permutation_for_every_key(size: int, key: int) -> None:
    assert sorted(permute(i, size, key) for i in range(size)) == list(range(size))


@settings(deadline=None)
@given(st.integers(1, 2**40), SEEDS, st.data())
def test_permute_stays_in_range_for_large_sizes(size: int, key: int, data: st.DataObject) -> None:
    indexes = data.draw(st.lists(st.integers(0, size - 1), unique=True, max_size=20))
    places = [permute(i, size, key) for i in indexes]
    assert len(set(places)) == len(indexes)
    assert all(0 <= place < size for place in places)
