"""Columns of numbers beside the tokens: from the rows, and from a frozen model; what is damaged or foreign."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dist_ft.config.data_sections import LoaderConfig
from dist_ft.data.shards.columns import Column
from dist_ft.data.shards.counts import Counts
from dist_ft.data.shards.pack import PackedSequence
from dist_ft.data.shards.score_file import ScoredBatch, make_scores, scores_name
from dist_ft.data.shards.shard_file import BATCH_SEQUENCES, ShardInfo, ShardWriter
from dist_ft.data.stream.cache import Replica, ShardCache
from dist_ft.data.stream.token_shards import TokenShards
from dist_ft.errors import DataError
from dist_ft.slots import SlotTotals
from dist_ft.storage.store import LocalStore

COUNT = BATCH_SEQUENCES + 3
LOGPS = Column("ref_logps")
TOP_K = (Column("teacher_logps", "token", "float16", width=2), Column("teacher_ids", "token", "int32", width=2))


def _write(directory: Path, key: str = "s0", count: int = COUNT) -> ShardInfo:
    """Writes sequences of two samples with a label each, and two trained tokens."""
    sequences = (
        PackedSequence([n, 1, 2, 3], [False, True, False, True], [0, 2], {"label": [n, n + 0.5]}) for n in range(count)
    )
    with ShardWriter(directory, key, [Column("label")], counts_samples=True) as writer:
        writer.add(sequences)
        return writer.close(Counts(num_rows=count))


def _score() -> Iterator[ScoredBatch]:
    for batch in np.split(np.arange(COUNT), [BATCH_SEQUENCES]):
        yield [
            [np.array([-n, -2 * n], np.float32) for n in batch],
            [np.array([-1, -2, -3, -4], np.float16) for _ in batch],
            [np.array([n, 7, 8, 9], np.int32) for n in batch],
        ]


def _open(directory: Path, key: str = "s0") -> TokenShards:
    cache = ShardCache([Replica(str(directory), LocalStore(directory))], LoaderConfig())
    return TokenShards([key], cache, score_key="model")


def test_numbers_stand_beside_the_tokens_of_their_sequence(tmp_path: Path) -> None:
    info = _write(tmp_path)
    make_scores(info, "model", (LOGPS, *TOP_K), _score, LocalStore(tmp_path))
    shards = _open(tmp_path)
    for row in (0, 1, COUNT - 1):
        found = shards.read(0, row)
        assert found.input_ids.tolist() == [row, 1, 2, 3]
        assert {name: values.tolist() for name, values in found.numbers.items()} == {
            "label": [row, row + 0.5], "ref_logps": [-row, -2 * row],
            "teacher_logps": [[-1, -2], [-3, -4]], "teacher_ids": [[row, 7], [8, 9]],
        }  # fmt: skip
    assert found.numbers["teacher_logps"].dtype == np.float16
    assert info.counts.num_samples == 2 * COUNT
    assert shards.index_rows(0, np.array([0, 5])).totals == SlotTotals(2, 8, 4, 4)


def test_scores_are_made_once(tmp_path: Path) -> None:
    info = _write(tmp_path)
    first = make_scores(info, "model", (LOGPS, *TOP_K), _score, LocalStore(tmp_path))

    def never() -> Iterator[ScoredBatch]:
        raise AssertionError("they are there")

    assert make_scores(info, "model", (LOGPS, *TOP_K), never, LocalStore(tmp_path)) == first


@pytest.mark.parametrize("harm", ["damaged", "of another shard", "of fewer sequences", "gone"])
def test_scores_that_do_not_belong_to_the_shard_are_an_error(harm: str, tmp_path: Path) -> None:
    info = _write(tmp_path)
    make_scores(info, "model", (LOGPS, *TOP_K), _score, LocalStore(tmp_path))
    name = scores_name("s0", "model")
    if harm == "damaged":
        data = bytearray((tmp_path / f"{name}.arrow").read_bytes())
        data[2000] ^= 1
        (tmp_path / f"{name}.arrow").write_bytes(data)
    elif harm == "gone":
        (tmp_path / f"{name}.json").unlink()
    else:
        other = _write(tmp_path, "s1", COUNT if harm == "of another shard" else 2)
        make_scores(other, "model", (LOGPS, *TOP_K), _score, LocalStore(tmp_path))
        stranger = scores_name("s1", "model")
        text = (tmp_path / f"{stranger}.json").read_text()
        if harm == "of fewer sequences":
            text = text.replace(stranger, name)
        (tmp_path / f"{name}.json").write_text(text)
    expected = {
        "damaged": "is damaged",
        "of another shard": "another shard",
        "of fewer sequences": "have 2",
        "gone": "is not at",
    }
    with pytest.raises(DataError, match=expected[harm]):
        _open(tmp_path).read(0, 0)
