"""Token shards on disk, and what a rank gets of a step."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_ft.stream.loader import (
    IGNORE,
    MicroBatch,
    RankLayout,
    StepBatch,
    TrainLoader,
    collate,
    eval_batches,
)
from dist_ft.stream.order import Order, SourceSpec, digest
from dist_ft.stream.pack import PackedSequence
from dist_ft.stream.shards import TokenShards, write_shard

WORLD_SIZES = range(1, 6)
MICRO_BATCHES = range(1, 5)


def make_sequence(rng: random.Random, first_token: int) -> PackedSequence:
    """One to four samples; the first token names the sequence, the others are small."""
    lengths = [rng.randint(1, 9) for _ in range(rng.randint(1, 4))]
    total = sum(lengths)
    starts = [0, *itertools.accumulate(lengths)][:-1]
    ids = [first_token, *(rng.randint(1, 99) for _ in range(total - 1))]
    trained = [place not in starts and rng.random() < 0.7 for place in range(total)]
    return PackedSequence(ids, trained, starts)


def write_source(directory: Path, shard_sizes: list[int], seed: int) -> tuple[TokenShards, list[PackedSequence]]:
    rng = random.Random(seed)
    tokens = itertools.count(1000 * (seed + 1))
    shards = [[make_sequence(rng, next(tokens)) for _ in range(size)] for size in shard_sizes]
    for index, sequences in enumerate(shards):
        write_shard(directory, index, sequences)
    return TokenShards(directory, len(shards)), [sequence for shard in shards for sequence in shard]


class Data:
    """Two sources on disk, the order over them and the sequences as they were written."""

    def __init__(self, directory: Path) -> None:
        written = [
            write_source(directory / "a", [5, 1, 7], seed=0),
            write_source(directory / "b", [4], seed=1),
        ]
        self.shards = [shards for shards, _ in written]
        self.sequences = [sequences for _, sequences in written]
        specs = (SourceSpec((5, 1, 7), 13), SourceSpec((4,), 8))
        self.order = Order(specs, seed=5)

    def loader(self, layout: RankLayout, global_batch_size: int, total: int) -> TrainLoader:
        return TrainLoader(self.order, self.shards, layout, global_batch_size, total)

    def at(self, position: int) -> PackedSequence:
        found = self.order.locate(position)
        return self.sequences[found.source][found.row]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return Data(tmp_path_factory.mktemp("shards"))


def expected_row(sequence: PackedSequence, length: int) -> dict[str, list[int]]:
    """What the row of a sequence must be, said the long way."""
    count = len(sequence.input_ids)
    targets = [
        sequence.input_ids[t + 1] if t + 1 < count and sequence.trained[t + 1] else IGNORE for t in range(length)
    ]
    starts = [*sequence.starts, count] if len(sequence.starts) > 1 else [0]
    positions = [t - max(start for start in starts if start <= t) for t in range(length)]
    return {
        "input_ids": sequence.input_ids + [0] * (length - count),
        "targets": targets,
        "position_ids": positions,
    }


def rows_of(micro: MicroBatch) -> list[tuple[int, dict[str, list[int]]]]:
    return [
        (
            int(slot),
            {name: getattr(micro, name)[row].tolist() for name in ("input_ids", "targets", "position_ids")},
        )
        for row, slot in enumerate(micro.slots)
    ]


# Shards


def test_a_shard_comes_back_as_written(data: Data) -> None:
    for shards, sequences in zip(data.shards, data.sequences, strict=True):
        assert sum(shards.shard_sizes) == len(sequences)
        for row, sequence in enumerate(sequences):
            ids, trained, starts = shards.read(row)
            assert (ids.tolist(), trained.tolist(), starts.tolist()) == (
                sequence.input_ids, sequence.trained, sequence.starts,
            )  # fmt: skip
            assert shards.sizes(row) == (len(sequence.input_ids), sum(sequence.trained))


def test_shard_sizes_come_from_the_indexes_alone(tmp_path: Path) -> None:
    write_source(tmp_path, [3, 2], seed=0)
    for path in tmp_path.glob("*.arrow"):
        path.unlink()
    shards = TokenShards(tmp_path, 2)
    assert shards.shard_sizes == (3, 2)
    assert shards.sizes(4)[0] >= 1


def test_rows_may_be_read_in_any_order(data: Data) -> None:
    for row in [12, 0, 5, 6, 4, 12, 0]:
        assert data.shards[0].read(row)[0].tolist() == data.sequences[0][row].input_ids


@pytest.mark.parametrize("row", [13, 99])
def test_a_row_beyond_the_end_is_an_error(data: Data, row: int) -> None:
    with pytest.raises(IndexError):
        data.shards[0].sizes(row)
    with pytest.raises(OSError):
        data.shards[0].read(row)


def test_tokens_of_large_vocabularies_fit(tmp_path: Path) -> None:
    write_shard(tmp_path, 0, [PackedSequence([2**31 - 1, 0], [False, True], [0])])
    assert TokenShards(tmp_path, 1).read(0)[0].tolist() == [2**31 - 1, 0]


# Training

GLOBAL_BATCH = 8
TOTAL = 2 * 21 + 3  # two epochs and a last step of five


def all_ranks(data: Data, world_size: int, micro_batch_size: int, step: int) -> list[StepBatch]:
    return [
        data.loader(RankLayout(rank, world_size, micro_batch_size), GLOBAL_BATCH, TOTAL).step(step)
        for rank in range(world_size)
    ]


@pytest.mark.parametrize("micro_batch_size", MICRO_BATCHES)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_ranks_together_have_each_sequence_of_the_step_once(data: Data, world_size: int, micro_batch_size: int) -> None:
    for step in range(-(-TOTAL // GLOBAL_BATCH)):
        batches = all_ranks(data, world_size, micro_batch_size, step)
        positions = range(step * GLOBAL_BATCH, min((step + 1) * GLOBAL_BATCH, TOTAL))
        rows = [row for batch in batches for micro in batch.micro_batches for row in rows_of(micro)]
        taken = {slot: values for slot, values in rows if slot >= 0}
        assert sorted(slot for slot, _ in rows if slot >= 0) == list(range(len(positions)))
        for slot, values in taken.items():
            assert values == expected_row(data.at(positions[slot]), len(values["input_ids"]))


@pytest.mark.parametrize("micro_batch_size", MICRO_BATCHES)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_totals_and_digest_are_the_steps_own_on_every_rank(data: Data, world_size: int, micro_batch_size: int) -> None:
    for step in range(-(-TOTAL // GLOBAL_BATCH)):
        positions = range(step * GLOBAL_BATCH, min((step + 1) * GLOBAL_BATCH, TOTAL))
        sequences = [data.at(position) for position in positions]
        expected = (
            sum(len(s.input_ids) for s in sequences),
            sum(sum(s.trained) for s in sequences),
            digest(map(data.order.locate, positions)),
            positions.stop,
        )
        batches = all_ranks(data, world_size, micro_batch_size, step)
        assert {(b.num_tokens, b.num_trained_tokens, b.digest, b.position) for b in batches} == {expected}
        # The divisor of the loss is what the targets hold.
        assert sum(int((m.targets != IGNORE).sum()) for b in batches for m in b.micro_batches) == expected[1]


@pytest.mark.parametrize("micro_batch_size", MICRO_BATCHES)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_every_rank_and_step_runs_the_same_passes(data: Data, world_size: int, micro_batch_size: int) -> None:
    batches = [b for step in (0, 5) for b in all_ranks(data, world_size, micro_batch_size, step)]
    assert {len(batch.micro_batches) for batch in batches} == {-(-GLOBAL_BATCH // (world_size * micro_batch_size))}
    shapes = [micro.input_ids.shape for batch in batches for micro in batch.micro_batches]
    assert all(rows == micro_batch_size and length % 8 == 0 for rows, length in shapes)


def test_padding_rows_train_nothing(data: Data) -> None:
    batches = all_ranks(data, 5, 4, step=5)
    rows = [row for batch in batches for micro in batch.micro_batches for row in rows_of(micro)]
    padding = [values for slot, values in rows if slot == -1]
    assert len(rows) == 20
    assert len(padding) == 15
    for values in padding:
        assert set(values["targets"]) == {IGNORE}
        assert set(values["input_ids"]) == {0}
        assert values["position_ids"] == list(range(len(values["input_ids"])))


def test_the_last_step_takes_what_is_left(data: Data) -> None:
    (batch,) = all_ranks(data, 1, 2, step=5)
    assert [micro.slots.tolist() for micro in batch.micro_batches][-1] == [-1, -1]
    assert sum(int((micro.slots >= 0).sum()) for micro in batch.micro_batches) == 5
    assert batch.position == TOTAL


def test_steps_are_read_at_random(data: Data) -> None:
    layout = RankLayout(1, 3, 2)
    in_order = [data.loader(layout, GLOBAL_BATCH, TOTAL).step(step) for step in range(6)]
    loader = data.loader(layout, GLOBAL_BATCH, TOTAL)
    for step in (4, 0, 5, 4, 2):
        for now, before in zip(loader.step(step).micro_batches, in_order[step].micro_batches, strict=True):
            assert rows_of(now) == rows_of(before)


def test_a_run_takes_every_sequence_of_an_epoch_once(data: Data) -> None:
    loader = data.loader(RankLayout(0, 1, 4), 7, 21)
    firsts = [
        int(micro.input_ids[row, 0])
        for step in range(3)
        for micro in loader.step(step).micro_batches
        for row, slot in enumerate(micro.slots)
        if slot >= 0
    ]
    a = [sequence.input_ids[0] for sequence in data.sequences[0]]
    b = [sequence.input_ids[0] for sequence in data.sequences[1]]
    assert sorted(firsts) == sorted([*a, *b, *b])  # b's share is twice its size


@pytest.mark.parametrize(("position", "epoch"), [(0, 0), (20, 0), (21, 1), (42, 2), (45, 2)])
def test_epochs_are_counted_when_complete(data: Data, position: int, epoch: int) -> None:
    assert data.loader(RankLayout(0, 1, 1), GLOBAL_BATCH, TOTAL).epoch(position) == epoch


# One pass


def row(ids: list[int], trained: list[int], starts: list[int]) -> Any:
    return np.array(ids, np.int32), np.array(trained, bool), np.array(starts, np.int32)


def test_a_pass_written_out() -> None:
    micro = collate([row([5, 6, 7, 8, 9], [0, 1, 1, 0, 1], [0, 3]), row([1, 2], [0, 1], [0])], [4, 2], 3)
    n = IGNORE
    assert micro.input_ids.tolist() == [[5, 6, 7, 8, 9, 0, 0, 0], [1, 2, 0, 0, 0, 0, 0, 0], [0] * 8]
    assert micro.targets.tolist() == [[6, 7, n, 9, n, n, n, n], [2, n, n, n, n, n, n, n], [n] * 8]
    assert micro.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2], list(range(8)), list(range(8))]
    assert micro.slots.tolist() == [4, 2, -1]
    assert {a.dtype for a in (micro.input_ids, micro.targets, micro.position_ids, micro.slots)} == {np.dtype(np.int64)}


@pytest.mark.parametrize("count", [1, 7, 8, 9, 16])
def test_a_row_that_fills_its_length_has_no_padding(count: int) -> None:
    micro = collate([row(list(range(1, count + 1)), [0] + [1] * (count - 1), [0])], [0], 1)
    assert micro.input_ids.shape == (1, -(-count // 8) * 8)
    assert micro.targets[0, : count - 1].tolist() == list(range(2, count + 1))
    assert set(micro.targets[0, count - 1 :].tolist()) <= {IGNORE}


def test_a_pass_without_rows_is_all_padding() -> None:
    micro = collate([], [], 2)
    assert micro.slots.tolist() == [-1, -1]
    assert set(micro.targets.ravel().tolist()) == {IGNORE}


# Evaluation


@pytest.mark.parametrize("micro_batch_size", MICRO_BATCHES)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_evaluation_takes_the_whole_split_once_at_any_size(data: Data, world_size: int, micro_batch_size: int) -> None:
    ranks = [list(eval_batches(data.shards[0], RankLayout(r, world_size, micro_batch_size))) for r in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    rows = [row for batches in ranks for micro in batches for row in rows_of(micro)]
    assert sorted(slot for slot, _ in rows if slot >= 0) == list(range(13))
    for slot, values in rows:
        if slot >= 0:
            assert values == expected_row(data.sequences[0][slot], len(values["input_ids"]))
        else:
            assert set(values["targets"]) == {IGNORE}
