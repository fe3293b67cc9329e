"""What a rank gets of a step: the right rows, each once over all ranks, the same whatever was asked before."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from dist_ft.config.data_sections import LoaderConfig
from dist_ft.data.shards.pack import PackedSequence
from dist_ft.data.shards.shard_file import ShardInfo
from dist_ft.data.stream.cache import Replica, ShardCache
from dist_ft.data.stream.loader import (
    IGNORE,
    MicroBatch,
    RankLayout,
    StepBatch,
    TrainLoader,
    collate,
    eval_batches,
    micro_batch,
    num_eval_batches,
)
from dist_ft.data.stream.order import Order, digest
from dist_ft.data.stream.token_shards import Row, TokenShards
from dist_ft.errors import DataError, DataUnavailableError
from dist_ft.storage.store import LocalStore, Store
from tests.helpers.shards import Remote, open_shards, write_shards

WORLD_SIZES = range(1, 6)
MICRO_BATCHES = range(1, 5)


class Data:
    """Two sources on disk, the order over them and the sequences as they were written."""

    def __init__(self, directory: Path) -> None:
        sizes = [[5, 1, 7], [8]]
        self.sequences = [write_shards(directory / str(i), counts, seed=i) for i, counts in enumerate(sizes)]
        self.shards = [open_shards(directory / str(i), len(counts)) for i, counts in enumerate(sizes)]
        self.order = Order([np.array(counts) for counts in sizes], None, seed=5)

    def loader(self, layout: RankLayout, global_batch_size: int, total: int, prefetch_steps: int = 0) -> TrainLoader:
        return TrainLoader(self.order, self.shards, layout, global_batch_size, total, prefetch_steps)

    def at(self, position: int) -> PackedSequence:
        found = self.order.at(position)
        return self.sequences[found.source][found.shard][found.row]


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
            digest(data.order.locate(np.array(positions))),
            positions.stop,
        )
        batches = all_ranks(data, world_size, micro_batch_size, step)
        assert {(b.totals.num_tokens, b.totals.num_trained_tokens, b.digest, b.position) for b in batches} == {expected}
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
    assert sorted(firsts) == sorted(s.input_ids[0] for source in data.sequences for shard in source for s in shard)


@pytest.mark.parametrize(("position", "epoch"), [(0, 0), (20, 0), (21, 1), (42, 2), (45, 2)])
def test_epochs_are_counted_when_complete(data: Data, position: int, epoch: int) -> None:
    assert data.loader(RankLayout(0, 1, 1), GLOBAL_BATCH, TOTAL).epoch(position) == epoch


# One pass


def row(ids: list[int], trained: list[int], starts: list[int]) -> Row:
    return Row(np.array(ids, np.int32), np.array(trained, bool), np.array(starts, np.int32))


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


def test_a_slot_of_two_rows_is_two_neighbours() -> None:
    layout = RankLayout(0, 1, 3, rows_per_slot=2)
    micro = micro_batch([row([5, 6, 7, 8], [0, 1, 0, 1], [0, 2]), row([1, 2, 3], [0, 0, 1], [0, 1])], [4, 2], layout)
    assert micro.slots.tolist() == [4, 4, 2, 2, -1, -1]
    assert micro.input_ids[:, :2].tolist() == [[5, 6], [7, 8], [1, 0], [2, 3], [0, 0], [0, 0]]
    n = IGNORE
    assert micro.targets[:, :2].tolist() == [[6, n], [8, n], [n, n], [3, n], [n, n], [n, n]]
    assert micro.position_ids.tolist() == [list(range(8))] * 6


def test_samples_and_their_numbers_are_counted_alike_packed_or_not() -> None:
    numbers = [{"label": np.array(values, np.float32)} for values in ([1, 2], [3, 4])]
    sequences = [row([5, 6, 7, 8], [0, 1, 0, 1], [0, 2]), row([1, 2, 3], [0, 1, 0], [0, 2])]
    sequences = [sequence._replace(numbers=of) for sequence, of in zip(sequences, numbers, strict=True)]
    packed = micro_batch(sequences, [4, 2], RankLayout(0, 1, 3))
    alone = micro_batch(sequences, [4, 2], RankLayout(0, 1, 3, rows_per_slot=2))
    assert packed.samples[:, :4].tolist() == [[0, 0, 1, 1], [2, 2, 3, -1], [-1] * 4]
    assert alone.samples[:, :2].tolist() == [[0, 0], [1, 1], [2, 2], [3, -1], [-1, -1], [-1, -1]]
    for micro in (packed, alone):
        assert micro.num_samples == 4
        assert micro.numbers["label"].tolist() == [1, 2, 3, 4]


def test_mismatched_answers_run_in_passes_of_their_own() -> None:
    sequence = row([1, 2, 3, 4, 5, 6, 7, 8], [0, 1, 0, 1, 0, 1, 0, 1], [0, 2, 5, 6])
    sequence = sequence._replace(numbers={"label": np.array([1, 1, 0, 0], np.float32)})
    layout = RankLayout(0, 1, 1, has_mismatched=True)
    own, others = (micro_batch([sequence], [0], layout, is_mismatched) for is_mismatched in (False, True))
    assert own.input_ids[0, :4].tolist() == [1, 2, 6, 0]
    assert own.samples[0, :4].tolist() == [0, 0, 1, -1]
    assert others.input_ids[0, :6].tolist() == [3, 4, 5, 7, 8, 0]
    assert others.position_ids[0, :5].tolist() == [0, 1, 2, 0, 1]
    assert [micro.numbers["label"].tolist() for micro in (own, others)] == [[1, 0], [1, 0]]


def test_a_pass_without_rows_is_all_padding() -> None:
    micro = collate([], [], 2)
    assert (micro.num_samples, micro.numbers) == (0, {})
    assert micro.slots.tolist() == [-1, -1]
    assert set(micro.targets.ravel().tolist()) == {IGNORE}


# Evaluation


@pytest.mark.parametrize("micro_batch_size", MICRO_BATCHES)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_evaluation_takes_the_whole_split_once_at_any_size(data: Data, world_size: int, micro_batch_size: int) -> None:
    ranks = [list(eval_batches(data.shards[0], RankLayout(r, world_size, micro_batch_size))) for r in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    rows = [row for batches in ranks for micro in batches for row in rows_of(micro)]
    written = [sequence for shard in data.sequences[0] for sequence in shard]
    assert sorted(slot for slot, _ in rows if slot >= 0) == list(range(13))
    for slot, values in rows:
        if slot >= 0:
            assert values == expected_row(written[slot], len(values["input_ids"]))
        else:
            assert set(values["targets"]) == {IGNORE}


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_long_split_gives_the_same_batches_at_any_size(tmp_path: Path, world_size: int) -> None:
    written = [s for shard in write_shards(tmp_path, [3] * 10 + [0, 1]) for s in shard]
    shards = open_shards(tmp_path, 12)
    (alone,) = [[rows_of(m) for m in eval_batches(shards, RankLayout(0, 1, 2))]]
    assert num_eval_batches(shards, RankLayout(0, 1, 2)) == len(alone) == 12 + 4
    ranks = [[rows_of(m) for m in eval_batches(shards, RankLayout(r, world_size, 2))] for r in range(world_size)]
    dealt = [batch for turn in zip(*ranks, strict=True) for batch in turn]
    assert dealt[: len(alone)] == alone
    assert all(slot == -1 for batch in dealt[len(alone) :] for slot, _ in batch)
    assert sorted(slot for batch in alone for slot, _ in batch if slot >= 0) == list(range(len(written)))
    for batch in alone:
        for slot, values in batch:
            assert slot == -1 or values == expected_row(written[slot], len(values["input_ids"]))


# Made ready ahead


@pytest.fixture
def loader(data: Data) -> Iterator[TrainLoader]:
    made = data.loader(RankLayout(1, 3, 2), GLOBAL_BATCH, TOTAL, prefetch_steps=2)
    yield made
    made.close()


def same(now: StepBatch, then: StepBatch) -> bool:
    rows = [[rows_of(micro) for micro in batch.micro_batches] for batch in (now, then)]
    return rows[0] == rows[1] and (now.digest, now.position) == (then.digest, then.position)


@pytest.mark.parametrize("steps", [range(6), [0, 1, 4, 5, 2, 2, 3, 0], [5, 6, 0]])
def test_steps_made_ready_are_those_that_are_asked_for(data: Data, loader: TrainLoader, steps: list[int]) -> None:
    plain = data.loader(RankLayout(1, 3, 2), GLOBAL_BATCH, TOTAL)
    assert all(same(loader.step(step), plain.step(step)) for step in steps)


class Slow:
    """Shards that say when a row is read and wait to be let on."""

    def __init__(self, shards: TokenShards) -> None:
        self._shards, self.reads = shards, threading.Semaphore(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._shards, name)

    def read(self, shard: int, row: int) -> Any:
        self.reads.release()
        return self._shards.read(shard, row)


def test_the_next_steps_are_made_while_nobody_asks(data: Data) -> None:
    slow = [Slow(shards) for shards in data.shards]
    made = TrainLoader(data.order, slow, RankLayout(0, 1, 8), 8, 32, prefetch_steps=2)  # type: ignore[arg-type]
    made.step(0)
    reads = 0
    while reads < 24:  # 8 of the step, 16 of the two after it
        reads += sum(s.reads.acquire(timeout=0.01) for s in slow)
    made.close()


def test_an_error_of_the_thread_comes_up_in_the_step_it_belongs_to(tmp_path: Path) -> None:
    write_shards(tmp_path, [4] * 3)
    shards = open_shards(tmp_path, 3)
    (tmp_path / "s1.arrow").write_bytes(b"x" * (tmp_path / "s1.arrow").stat().st_size)
    made = TrainLoader(Order([np.array([4] * 3)], None, 0, False), [shards], RankLayout(0, 1, 4), 4, 12, 2)
    assert made.step(0).position == 4
    with pytest.raises(DataError, match=r"s1\.arrow is damaged"):
        made.step(1)
    assert made.step(2).position == 12
    made.close()


def test_the_shards_of_the_next_window_are_fetched_before_they_are_needed(tmp_path: Path) -> None:
    write_shards(tmp_path / "remote", [2] * 24)
    place = Replica("remote", cast(Store, Remote(tmp_path / "remote")))
    files = ShardCache([place], LoaderConfig(cache_dir=str(tmp_path / "copies")))
    order = Order([np.array([2] * 24)], None, 0)
    shards = TokenShards([f"s{n}" for n in range(24)], files, np.array([2] * 24))
    made = TrainLoader(order, [shards], RankLayout(0, 1, 4), 4, 48, 1)
    made.step(0)
    made._fetchers.shutdown()  # waits until they are done
    fetched = {int(path.name.split(".")[0][1:]) for path in (tmp_path / "copies").glob("*.arrow")}
    assert fetched == {i.shard for i in order.locate(np.arange(32))}  # two windows, of three
    made.close()


def test_a_resumed_rank_asks_for_no_description_of_a_shard_whose_size_was_handed_over(tmp_path: Path) -> None:
    write_shards(tmp_path / "remote", [2] * 40)
    keys, sizes = [f"s{n}" for n in range(40)], np.array([2] * 40)
    remote = Remote(tmp_path / "remote")
    files = ShardCache([Replica("remote", cast(Store, remote))], LoaderConfig(cache_dir=str(tmp_path / "copies")))
    shards = TokenShards(keys, files, made_sizes=[2] * 36 + [None] * 4)
    order = Order([shards], None, 0, shuffle=False)
    resumed = TrainLoader(order, [shards], RankLayout(0, 1, 4), 4, 80)
    step = resumed.step(12)  # positions 48 to 51: shards 24 and 25, the first of the fourth window
    resumed._fetchers.shutdown()
    resumed.close()
    asked = {name.removesuffix(".json") for name in remote.asked if name.endswith(".json")}
    assert asked == {f"s{n}" for n in range(16, 32)}  # those whose files are fetched: windows three and four
    local = ShardCache([Replica("local", LocalStore(tmp_path / "remote"))], LoaderConfig())
    known = TokenShards(keys, local, sizes)
    whole = TrainLoader(Order([known], None, 0, shuffle=False), [known], RankLayout(0, 1, 4), 4, 80)
    assert whole.step(12).digest == step.digest
    whole.close()


class Watched(ShardCache):
    """Says when a shard is asked for that is not there."""

    def __init__(self, directory: Path) -> None:
        super().__init__([Replica(str(directory), LocalStore(directory))], LoaderConfig(), ready_limit_s=600)
        self.is_asked = threading.Event()

    def info(self, key: str) -> ShardInfo:
        if key.startswith("late"):
            self.is_asked.set()
        return super().info(key)


def test_closing_ends_a_wait_for_a_shard_that_never_comes(tmp_path: Path) -> None:
    write_shards(tmp_path, [4])
    files = Watched(tmp_path)
    shards = TokenShards(["s0", "late"], files)
    # Nothing made ahead: the asking thread would still be handing out work when the loader is closed.
    made = TrainLoader(Order([shards], None, 0), [shards], RankLayout(0, 1, 4), 4, 12)
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            made.step(0)
        except DataUnavailableError as error:
            errors.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    assert files.is_asked.wait(20)
    made.close()
    asking.join(20)
    assert [str(error) for error in errors] == ["the loader was closed while it waited for data"]
