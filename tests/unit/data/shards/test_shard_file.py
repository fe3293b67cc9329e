"""Token shards on disk: they come back as written, in flat memory, and damage is never read as data."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_ft.config.data_sections import LoaderConfig
from dist_ft.data.shards import shard_file as module
from dist_ft.data.shards.counts import Counts
from dist_ft.data.shards.pack import PackedSequence
from dist_ft.data.shards.shard_file import BATCH_SEQUENCES, ShardInfo, ShardWriter
from dist_ft.data.stream import token_shards
from dist_ft.data.stream.cache import Replica, ShardCache
from dist_ft.data.stream.token_shards import MAX_OPEN, TokenShards
from dist_ft.errors import DataError
from dist_ft.slots import SlotTotals
from dist_ft.storage.store import LocalStore
from tests.helpers.shards import make_sequence, open_shards, places, write_shard, write_shards

ENDINGS = (".arrow", ".index.npy", ".json")


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    for part in (module, token_shards):
        monkeypatch.setattr(part, "BATCH_SEQUENCES", 4)


def assert_holds(shards: TokenShards, written: list[list[PackedSequence]]) -> None:
    assert [len(sequences) for sequences in written] == shards.num_sequences(np.arange(len(written))).tolist()
    for shard, row in places(shards):
        ids, trained, starts, _ = shards.read(shard, row)
        sequence = written[shard][row]
        assert (ids.tolist(), trained.tolist(), starts.tolist()) == (
            sequence.input_ids, sequence.trained, sequence.starts,
        )  # fmt: skip
        index = shards.index_rows(shard, np.array([row]))
        assert (index.num_tokens.tolist(), index.num_trained_tokens.tolist()) == ([len(ids)], [sum(sequence.trained)])
        assert index.totals == SlotTotals(1, len(ids), sum(sequence.trained))


@pytest.mark.usefixtures("small_batches")
def test_shards_come_back_as_written(tmp_path: Path) -> None:
    written = write_shards(tmp_path, [1, 4, 5, 0, 13])
    assert_holds(open_shards(tmp_path, 5), written)


def test_a_shard_of_several_full_batches_comes_back(tmp_path: Path) -> None:
    written = write_shards(tmp_path, [2 * BATCH_SEQUENCES + 3])
    assert_holds(open_shards(tmp_path, 1), written)


@pytest.mark.usefixtures("small_batches")
def test_the_file_is_plain_arrow(tmp_path: Path) -> None:
    (sequences,) = write_shards(tmp_path, [9])
    with pa.memory_map(str(tmp_path / "s0.arrow")) as file:
        reader = pa.ipc.open_file(file)
        assert [reader.get_batch(i).num_rows for i in range(reader.num_record_batches)] == [4, 4, 1]
        assert reader.read_all().column("input_ids").to_pylist() == [s.input_ids for s in sequences]


@pytest.mark.usefixtures("small_batches")
def test_what_a_shard_says_of_itself_is_true(tmp_path: Path) -> None:
    rng = random.Random(1)
    sequences = [make_sequence(rng, 5) for _ in range(9)]
    with ShardWriter(tmp_path, "k") as writer:
        writer.add(iter(sequences[:3]))
        writer.add(sequences[3:])
        info = writer.close(Counts(num_rows=20, num_untrained_rows=3, num_long_samples=2, num_bad_rows=1))
    tokens, trained = [len(s.input_ids) for s in sequences], [sum(s.trained) for s in sequences]
    counts = info.counts
    assert (info.key, counts.num_rows, counts.num_untrained_rows, counts.num_long_samples, counts.num_bad_rows) == (
        "k", 20, 3, 2, 1,
    )  # fmt: skip
    assert (info.counts.num_sequences, info.counts.num_tokens, info.counts.num_trained_tokens) == (
        9,
        sum(tokens),
        sum(trained),
    )
    assert (info.max_tokens, info.max_trained_tokens) == (max(tokens), max(trained))
    assert [info.num_bytes, info.num_index_bytes] == [(tmp_path / f"k{e}").stat().st_size for e in ENDINGS[:2]]
    found = json.loads((tmp_path / "k.json").read_text())
    assert ShardInfo.from_dict({**found, "extra": 1}) == info
    with pytest.raises(KeyError):
        ShardInfo.from_dict({"key": "k"})


def test_the_same_sequences_give_the_same_bytes(tmp_path: Path) -> None:
    write_shards(tmp_path / "a", [600])
    write_shards(tmp_path / "b", [600])
    assert all((tmp_path / "a" / f"s0{e}").read_bytes() == (tmp_path / "b" / f"s0{e}").read_bytes() for e in ENDINGS)


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[PackedSequence]:
        yield PackedSequence([1, 2], [False, True], [0])
        raise DataError("row 2")

    with pytest.raises(DataError), ShardWriter(tmp_path, "k") as writer:
        writer.add(broken())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("small_batches")
def test_a_writer_keeps_one_batch_in_memory(tmp_path: Path) -> None:
    rng = random.Random(0)
    most = 0
    with ShardWriter(tmp_path, "k") as writer:
        for _ in range(50):
            writer.add([make_sequence(rng, 1)])
            most = max(most, len(writer._waiting))
        writer.close(Counts(num_rows=50))
    assert most < 4


def test_tokens_of_large_vocabularies_fit(tmp_path: Path) -> None:
    write_shard(tmp_path, "s0", [PackedSequence([2**31 - 1, 0], [False, True], [0])])
    assert open_shards(tmp_path, 1).read(0, 0)[0].tolist() == [2**31 - 1, 0]


@settings(deadline=None, max_examples=30)
@given(trained=st.lists(st.lists(st.booleans(), min_size=1, max_size=20), min_size=1, max_size=12))
def test_masks_are_unpacked_at_any_bit(tmp_path_factory: pytest.TempPathFactory, trained: list[list[bool]]) -> None:
    directory = tmp_path_factory.mktemp("bits")
    write_shard(directory, "s0", [PackedSequence([7] * len(mask), mask, [0]) for mask in trained])
    opened = open_shards(directory, 1)
    assert [opened.read(0, row)[1].tolist() for row in range(len(trained))] == trained


def test_sizes_come_from_the_index_alone(tmp_path: Path) -> None:
    (sequences, _) = write_shards(tmp_path, [3, 2])
    (tmp_path / "s0.arrow").unlink()
    found = open_shards(tmp_path, 2).index_rows(0, np.arange(3))
    assert found.num_tokens.tolist() == [len(s.input_ids) for s in sequences]


@pytest.mark.parametrize("row", [5, 600])
def test_a_row_beyond_the_end_is_an_error(tmp_path: Path, row: int) -> None:
    write_shards(tmp_path, [5])
    opened = open_shards(tmp_path, 1)
    with pytest.raises(IndexError):
        opened.index_rows(0, np.array([row]))
    with pytest.raises(IndexError):
        opened.read(0, row)


def test_many_shards_keep_few_open_and_no_descriptor(tmp_path: Path) -> None:
    written = write_shards(tmp_path, [2] * (2 * MAX_OPEN))
    opened = open_shards(tmp_path, len(written))
    before = len(list(Path("/proc/self/fd").iterdir()))
    assert_holds(opened, written)
    assert len(opened._opened) == MAX_OPEN
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert_holds(opened, written)


def test_what_is_mapped_stays_readable_when_deleted(tmp_path: Path) -> None:
    (sequences,) = write_shards(tmp_path, [9])
    opened = open_shards(tmp_path, 1)
    opened.read(0, 0)
    for ending in ENDINGS:
        (tmp_path / f"s0{ending}").unlink()
    assert opened.read(0, 8)[0].tolist() == sequences[8].input_ids


# Damage


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("batch", [0, 1, 2])
def test_damage_is_found_where_it_is_read_and_nowhere_else(tmp_path: Path, batch: int) -> None:
    (sequences,) = write_shards(tmp_path, [12])
    ends = json.loads((tmp_path / "s0.json").read_text())["batch_bounds"][1:]
    flip(tmp_path / "s0.arrow", ends[batch] - 9)
    opened = open_shards(tmp_path, 1)
    for row in range(12):
        if row // 4 != batch:
            assert opened.read(0, row)[0].tolist() == sequences[row].input_ids
            continue
        with pytest.raises(DataError, match=r"s0\.arrow is damaged.*Delete it and .* resume"):
            opened.read(0, row)


@pytest.mark.parametrize("size", [0, 100, 500])
@pytest.mark.parametrize("ending", [".arrow", ".index.npy"])
def test_a_file_cut_short_is_damaged(tmp_path: Path, ending: str, size: int) -> None:
    write_shards(tmp_path, [300])
    path = tmp_path / f"s0{ending}"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DataError, match=rf"s0\{ending} is damaged"):
        open_shards(tmp_path, 1).read(0, 299)


def test_every_flipped_byte_of_the_index_is_found(tmp_path: Path) -> None:
    write_shards(tmp_path, [3])
    for at in range((tmp_path / "s0.index.npy").stat().st_size):
        flip(tmp_path / "s0.index.npy", at)
        with pytest.raises(DataError, match=r"index\.npy is damaged"):
            open_shards(tmp_path, 1).index_rows(0, np.arange(3))
        flip(tmp_path / "s0.index.npy", at)


def test_a_shard_that_is_gone_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path, [3])
    opened = open_shards(tmp_path, 1)
    (tmp_path / "s0.arrow").unlink()
    with pytest.raises(DataError, match=rf"s0\.arrow is not at {tmp_path}; resume"):
        opened.read(0, 0)


def test_a_damaged_file_is_read_from_another_place(tmp_path: Path) -> None:
    (sequences,) = write_shards(tmp_path / "a", [9])
    write_shards(tmp_path / "b", [9])
    flip(tmp_path / "a" / "s0.arrow", -600)
    flip(tmp_path / "a" / "s0.index.npy", -1)
    stores = [Replica(name, LocalStore(tmp_path / name)) for name in "ab"]
    opened = TokenShards(["s0"], ShardCache(stores, LoaderConfig()))
    assert_holds(opened, [sequences])
    flip(tmp_path / "b" / "s0.arrow", -600)
    with pytest.raises(
        DataError, match=r"a: DataError: .*a/s0\.arrow is damaged.*; b: DataError: .*b/s0\.arrow is dam"
    ):
        TokenShards(["s0"], ShardCache(stores, LoaderConfig())).read(0, 8)
