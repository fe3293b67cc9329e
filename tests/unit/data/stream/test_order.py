"""The order: a pure function that gives every sequence once a pass, however late sizes become known.

The schedules at the end play whole runs without processes: world sizes that change, stops and resumes at every step.
"""

from __future__ import annotations

import itertools
import math
import random
import time
from collections import Counter
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_ft.data.stream.order import (
    WINDOW_SHARDS,
    Order,
    SequenceId,
    SequenceIds,
    digest,
    run_length,
    step_positions,
)
from dist_ft.errors import DataError
from dist_ft.slots import layout_slots


class LateSizes:
    """Sizes that become known when they are asked for; remembers which were."""

    def __init__(self, sizes: Iterable[int]) -> None:
        self._sizes = np.array(list(sizes), np.int64)
        self.asked: list[int] = []

    @property
    def num_shards(self) -> int:
        return len(self._sizes)

    def num_sequences(self, shards: np.ndarray) -> np.ndarray:
        self.asked += shards.tolist()
        return self._sizes[shards]


def make_order(*sources: Iterable[int], weights: list[float] | None = None, seed: int = 0, **how: object) -> Order:
    return Order([np.array(list(sizes), np.int64) for sizes in sources], weights, seed, **how)  # type: ignore[arg-type]


def stream(order: Order, count: int, start: int = 0) -> list[SequenceId]:
    return list(order.locate(np.arange(start, start + count)))


def array_of(ids: Iterable[SequenceId]) -> SequenceIds:
    rows = np.array([(i.source, i.pass_index, i.shard, i.row) for i in ids], np.int64).reshape(-1, 4)
    return SequenceIds(*rows.T)


def assert_every_pass_is_whole(sources: list[list[int]], ids: list[SequenceId]) -> None:
    """Fails unless each source's sequences come pass by pass, each row once a pass."""
    for index, sizes in enumerate(sources):
        used = [i for i in ids if i.source == index]
        everything = {(shard, row) for shard, size in enumerate(sizes) for row in range(size)}
        for pass_index, of_pass in itertools.groupby(used, lambda i: i.pass_index):
            seen = [(i.shard, i.row) for i in of_pass]
            assert len(set(seen)) == len(seen) == min(len(used) - pass_index * len(everything), len(everything))
            assert set(seen) <= everything
        assert [i.pass_index for i in used] == [n // len(everything) for n in range(len(used))]


SEEDS = st.integers(0, 2**63 - 1)
SHARDS = st.lists(st.integers(0, 9), min_size=1, max_size=20).filter(any)
SOURCES = st.lists(SHARDS, min_size=1, max_size=3)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
@pytest.mark.parametrize(
    "sources",
    [
        [[1]], [[2]], [[100]], [[1] * 30], [[7, 1, 13, 2, 9, 4, 4, 8, 3, 21, 5]], [[6], [3]],
        [[50, 50], [1], [1, 1, 1]], [[0, 5, 0, 3]], [[0] * 9 + [4] + [0] * 9],
    ],
)  # fmt: skip
def test_an_epoch_without_weights_is_every_sequence_once(sources: list[list[int]], seed: int, shuffle: bool) -> None:
    order = make_order(*sources, seed=seed, shuffle=shuffle)
    size = sum(map(sum, sources))
    assert order.epoch_size == size
    for epoch in range(3):
        expected = Counter(
            SequenceId(s, epoch, shard, row)
            for s, sizes in enumerate(sources)
            for shard, count in enumerate(sizes)
            for row in range(count)
        )
        assert Counter(stream(order, size, epoch * size)) == expected


@settings(deadline=None, max_examples=60)
@given(SOURCES, SEEDS, st.data())
def test_each_pass_over_a_source_takes_each_row_once(sources: list[list[int]], seed: int, data: st.DataObject) -> None:
    weights = data.draw(st.none() | st.lists(st.floats(0.1, 9), min_size=len(sources), max_size=len(sources)))
    ids = stream(make_order(*sources, weights=weights, seed=seed), 300)
    assert len(set(ids)) == len(ids)
    assert_every_pass_is_whole(sources, ids)


@settings(deadline=None, max_examples=30)
@given(SOURCES, SEEDS, st.randoms(use_true_random=False))
def test_a_position_does_not_depend_on_what_was_asked_before(
    sources: list[list[int]], seed: int, rng: random.Random
) -> None:
    positions = list(range(2 * sum(map(sum, sources))))
    forwards = stream(make_order(*sources, seed=seed), len(positions))
    rng.shuffle(positions)
    other = make_order(*sources, seed=seed)
    assert list(other.locate(np.array(positions))) == [forwards[p] for p in positions]
    assert [other.at(p) for p in positions[:20]] == [forwards[p] for p in positions[:20]]


def test_seed_and_pass_change_the_order() -> None:
    orders = [[(i.shard, i.row) for i in stream(make_order([30, 30], seed=seed), 120)] for seed in range(20)]
    passes = [tuple(rows[:60]) for rows in orders] + [tuple(rows[60:]) for rows in orders]
    assert len(set(passes)) == len(passes)


def test_equal_sources_are_shuffled_differently() -> None:
    ids = stream(make_order([50], [50]), 100)
    assert [i.row for i in ids if i.source == 0] != [i.row for i in ids if i.source == 1]


def test_the_order_is_well_mixed() -> None:
    """Neighbours stay neighbours about as often as in a random permutation (twice), not more."""
    rows = [i.row for i in stream(make_order([1000]), 1000)]
    assert sum(abs(a - b) == 1 for a, b in itertools.pairwise(rows)) < 12
    assert abs(sum(rows[:500]) / 500 - 499.5) < 4 * 1000 / math.sqrt(12 * 500)


def test_a_window_reads_few_shards() -> None:
    order = make_order([5] * (3 * WINDOW_SHARDS))
    size = 5 * WINDOW_SHARDS
    touched = [{i.shard for i in stream(order, size, start)} for start in range(0, 3 * size, size)]
    assert [len(shards) for shards in touched] == [WINDOW_SHARDS] * 3
    assert set.union(*touched) == set(range(3 * WINDOW_SHARDS))


def test_a_curriculum_keeps_the_order_of_the_files() -> None:
    sources = [[3] * 20, [2] * 5]
    ids = stream(make_order(*sources, shuffle=False), 140)
    for index, sizes in enumerate(sources):
        expected = [(p, shard, row) for p in (0, 1) for shard, n in enumerate(sizes) for row in range(n)]
        assert [(i.pass_index, i.shard, i.row) for i in ids if i.source == index] == expected
    shuffled = stream(make_order(*sources), 140)
    assert [i.source for i in shuffled] == [i.source for i in ids]  # mixed alike


def test_weights_mix_whatever_the_sizes() -> None:
    small, large = (stream(make_order([4], sizes, weights=[1, 3]), 400) for sizes in ([100], [1] * 30))
    assert [i.source for i in small] == [i.source for i in large]
    assert Counter(i.source for i in small) == {0: 100, 1: 300}
    assert max(i.pass_index for i in small if i.source == 0) == 24


def test_the_order_never_changes_between_releases() -> None:
    """Another order under the same seed would make every resume across releases wrong."""
    ids = stream(make_order([4, 2], [3], seed=7), 9)
    assert [i.source for i in ids] == [1, 0, 0, 1, 0, 0, 1, 0, 0]
    assert [(i.shard, i.row) for i in ids] == [(0, 2), (0, 2), (1, 1), (0, 1), (0, 3), (0, 0), (0, 0), (1, 0), (0, 1)]
    assert digest(array_of(ids)) == "b3d6a0ee3905306d"
    assert (
        digest(make_order([4, 2] * 10, [3], weights=[2, 1], seed=7).locate(np.arange(10**9, 10**9 + 8)))
        == "00a927b3ba8568c2"
    )


# Epochs


@pytest.mark.parametrize(("position", "epoch"), [(0, 0), (8, 0), (9, 1), (26, 2), (27, 3)])
def test_epochs_are_counted_when_complete(position: int, epoch: int) -> None:
    assert make_order([4, 2], [3]).epoch(position) == epoch


def test_without_an_end_epochs_are_passes_over_the_first_source() -> None:
    order = make_order([4], [100], weights=[1, 1], exhaust="repeat")
    assert order.epoch_size is None
    passes = [i for i in stream(order, 40) if i.source == 0]
    ends = [order.epoch(position) for position in range(41)]
    assert ends[-1] == len(passes) // 4 == 5
    assert sorted(ends) == ends
    assert ends[0] == 0


# Sizes that come late


@settings(deadline=None, max_examples=40)
@given(SOURCES, SEEDS, st.booleans(), st.integers(1, 30))
def test_late_sizes_give_the_same_sequences_and_are_never_asked_for_ahead_of_the_window(
    sources: list[list[int]], seed: int, shuffle: bool, step: int
) -> None:
    weights = [1.0 + index for index in range(len(sources))]
    known = make_order(*sources, weights=weights, seed=seed, shuffle=shuffle)
    late = [LateSizes(sizes) for sizes in sources]
    order = Order(late, weights, seed, shuffle)
    reached: list[set[int]] = [set() for _ in sources]
    for start in range(0, 2 * sum(map(sum, sources)), step):
        ids = stream(order, step, start)
        assert ids == stream(known, step, start)
        order.epoch(start + step)
        order.windows(start + step)
        for index, sizes in enumerate(sources):
            taken = {i.shard for i in ids if i.source == index and i.pass_index == 0}
            used_up = any(i.source == index and i.pass_index for i in ids)
            reached[index] |= set(range(len(sizes))) if used_up else taken
            asked = set(late[index].asked)
            assert len(asked) == len(late[index].asked), "a size was asked for twice"
            assert reached[index] <= asked
            # A window without a sequence is passed over, and the rest of a window is asked for with its first shard.
            if all(sizes) and not used_up:
                assert len(asked) <= -(-len(reached[index]) // WINDOW_SHARDS) * WINDOW_SHARDS or len(taken) == 0


def test_only_the_windows_reached_are_asked_for() -> None:
    sizes = LateSizes([5] * 40)
    order = Order([sizes], None, 0)
    asked = []
    for position in range(200):
        order.at(position)
        asked.append(len(sizes.asked))
    assert asked == [WINDOW_SHARDS * (position // (5 * WINDOW_SHARDS) + 1) for position in range(200)]
    assert order.epoch(200) == 1
    assert order.at(200).pass_index == 1
    assert len(sizes.asked) == 40


def test_epochs_are_counted_alike_however_much_is_known() -> None:
    """A resume in a later pass learns all sizes at once; a run from the start, one by one."""
    forwards = Order([LateSizes([3] * 20), LateSizes([2])], [1, 1], 0)
    for position in range(0, 300, 10):
        forwards.locate(np.arange(position, position + 10))
        resumed = Order([LateSizes([3] * 20), LateSizes([2])], [1, 1], 0)
        resumed.at(299)
        assert forwards.epoch(position + 10) == resumed.epoch(position + 10) == (position + 10) // 2 // 60


def test_a_resume_learns_the_same_order() -> None:
    known = make_order([5] * 40, seed=3)
    for position in (0, 39, 40, 150, 199, 200, 555):
        assert Order([LateSizes([5] * 40)], None, 3).at(position) == known.at(position)


def test_a_source_without_a_sequence_is_an_error() -> None:
    with pytest.raises(DataError, match=r"data\.train\.1: none of its 2 shards"):
        Order([LateSizes([5]), LateSizes([0, 0])], [1, 1], 0).locate(np.arange(2))


@pytest.mark.parametrize("sizes", [[5] * 40, [3] * 5, [7]])
def test_the_windows_named_ahead_are_those_that_are_read(sizes: list[int]) -> None:
    order = make_order(sizes, seed=5)
    names = set()
    for position in range(3 * sum(sizes)):
        ((name, shards),) = order.windows(position)
        names.add(name)
        assert order.at(position).shard in shards
        ahead = order.at(position + 5 * WINDOW_SHARDS - 1 if len(sizes) == 40 else position)
        assert ahead.shard in shards
    assert len(names) == (15 if len(sizes) == 40 else 3)


# Size and speed


def test_a_billion_sequences_open_anywhere_in_milliseconds() -> None:
    sizes = np.full(125_000, 8_000)
    seconds = []
    for attempt in range(8):
        began = time.thread_time()
        found = Order([sizes], None, attempt).at(6_543_210_987)
        seconds.append(time.thread_time() - began)
        assert found.pass_index == 6
    assert min(seconds) < 0.010


def test_a_million_positions_take_less_than_a_second() -> None:
    order = make_order([8_000] * 125_000, seed=3)
    began = time.thread_time()
    ids = order.locate(np.arange(500_000_000, 501_000_000))
    assert time.thread_time() - began < 1.0
    assert len(np.unique(ids.shard * 8_000 + ids.row)) == 1_000_000


def test_a_far_position_costs_what_a_near_one_does() -> None:
    ids = stream(make_order([8192] * 100, [5000, 3], weights=[5, 1], seed=3), 2000, 10**12)
    assert len(set(ids)) == 2000
    assert all(type(value) is int for i in ids for value in (i.source, i.pass_index, i.shard, i.row))


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
        (None, 4, 1.0, 7, (7, 28)),
    ],
)
def test_run_length(
    epoch_size: int | None, global_batch_size: int, epochs: float, max_steps: int | None, expected: tuple[int, int]
) -> None:
    assert run_length(epoch_size, global_batch_size, epochs, max_steps) == expected


# Digest


IDS = st.lists(st.builds(SequenceId, *[st.integers(0, 9)] * 4), max_size=12)


@settings(deadline=None)
@given(IDS, st.data())
def test_the_digest_does_not_depend_on_the_order(ids: list[SequenceId], data: st.DataObject) -> None:
    assert digest(array_of(data.draw(st.permutations(ids)))) == digest(array_of(ids))


def test_the_digest_tells_apart_what_differs() -> None:
    one = [SequenceId(*values) for values in itertools.product((0, 1, 11), repeat=4)]
    cases = [[], *([i] for i in one), *([i, i] for i in one), *([i, i, i] for i in one[:9]), one[:2], one[1:3]]
    digests = [digest(array_of(ids)) for ids in cases]
    assert len(set(digests)) == len(digests)
    assert all(len(text) == 16 and int(text, 16) >= 0 for text in digests)


# Schedules: whole runs without processes


def play(order_of: object, rng: random.Random, steps: int, batch: int, total: int) -> list[SequenceId]:
    """Runs to the end, each attempt at another world size from the cursor alone; returns what all ranks took."""
    step, taken = 0, []
    while step < steps:
        order, world_size, micro = order_of(), rng.randint(1, 64), rng.randint(1, 3)  # type: ignore[operator]
        until = rng.randint(step + 1, steps)
        for now in range(step, until):
            ids = list(order.locate(np.array(step_positions(now, batch, total))))
            for ranks in layout_slots([i.row for i in ids], micro, world_size, batch):
                assert len(ranks) == world_size
                taken += [ids[slot] for slots in ranks for slot in slots]
        # A kill loses the steps since the last checkpoint: what they took does not count, and comes again.
        kept = rng.randint(step + 1, until)
        taken = taken[: step_positions(kept - 1, batch, total).stop]
        step = kept
    return taken


@pytest.mark.parametrize("block", range(20))
def test_a_thousand_schedules_take_a_prefix_of_the_order_each_sequence_once(block: int) -> None:
    for number in range(50):
        rng = random.Random(1000 * block + number)
        sources = [[rng.randint(1, 5) for _ in range(rng.randint(1, 12))] for _ in range(rng.randint(1, 3))]
        weights = rng.choice([None, [rng.uniform(0.1, 5) for _ in sources]])
        exhaust = rng.choice(["first", "all", "repeat"]) if weights else "all"
        how = {"weights": weights, "seed": rng.randrange(2**63), "shuffle": rng.random() < 0.8, "exhaust": exhaust}
        whole = make_order(*sources, **how)  # type: ignore[arg-type]
        batch = rng.randint(1, 17)
        steps, total = run_length(whole.epoch_size, batch, rng.uniform(0.2, 3), None if whole.epoch_size else 9)
        ahead = play(lambda: make_order(*sources, **how), random.Random(number), steps, batch, total)  # noqa: B023
        expected = stream(whole, total)
        assert Counter(ahead) == Counter(expected)
        assert len(set(expected)) == total
        assert_every_pass_is_whole(sources, expected)
        if weights or len(sources) == 1:
            late = play(
                lambda: Order([LateSizes(s) for s in sources], weights, how["seed"], how["shuffle"], exhaust),  # type: ignore[arg-type]  # noqa: B023
                random.Random(number), steps, batch, total,
            )  # fmt: skip
            assert late == ahead


@pytest.mark.parametrize("exhaust", ["first", "all", "repeat"])
def test_a_resume_at_every_step_sees_what_an_undisturbed_run_does(exhaust: str) -> None:
    def make() -> Order:
        return Order([LateSizes([3, 1, 2] * 7), LateSizes([2, 2])], [2, 1], 11, True, exhaust)

    undisturbed = stream(make(), 140)
    for step in range(20):
        resumed = make()
        assert stream(resumed, 140 - 7 * step, 7 * step) == undisturbed[7 * step :]
