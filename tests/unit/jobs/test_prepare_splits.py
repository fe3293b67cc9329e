"""What the preparation makes of a config."""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_ft.config import Config
from dist_ft.config.data_sections import RowSource
from dist_ft.data.rows.held_out_count import fraction_above
from dist_ft.data.shards.shard_file import ShardInfo, read_info
from dist_ft.data.shards.split import PreparedSplit
from dist_ft.data.sources import listing
from dist_ft.data.sources.source_file import SourceFile
from dist_ft.data.stream import cache
from dist_ft.data.stream.cache import open_split
from dist_ft.errors import ConfigError, DataError
from dist_ft.jobs import make_shard
from dist_ft.jobs.data_report.measure import measure
from dist_ft.jobs.prepare import prepare, prepare_or_list, run
from dist_ft.jobs.spec import (
    MadeShard,
    MissingShards,
    Preparation,
    ShardJob,
    StreamedShards,
    Window,
    decode_preparation,
)
from dist_ft.jobs.splits import cache_address, with_fraction
from dist_ft.storage.store import LocalStore, Store
from tests.helpers.configs import tiny_config
from tests.helpers.splits import prepared_splits


def test_what_is_trained_on_is_a_part_of_what_was_prepared(tmp_path: Path) -> None:
    splits = {}
    for train_on in ("assistant", "last", "all"):
        (splits[train_on],), held_out = prepared_splits(tiny_config(tmp_path, data__train_on=train_on))
        assert held_out is not None and held_out.key != splits[train_on].key
    assert len({split.key for split in splits.values()}) == 3
    assert len({split.known_counts.num_tokens for split in splits.values()}) == 1
    # Every conversation has one answer; of all tokens only the first of each is not trained.
    trained = {train_on: split.known_counts.num_trained_tokens for train_on, split in splits.items()}
    assert trained["assistant"] == trained["last"] < trained["all"]
    assert trained["all"] == splits["all"].known_counts.num_tokens - splits["all"].known_counts.num_sequences


SMALL = {"data__part_mib": 0.002}
"""Parts of some ten rows."""


def check_wire(found: Preparation | MissingShards) -> None:
    sent = json.dumps(found.to_dict())
    received = decode_preparation(json.loads(sent))
    assert (type(received), json.dumps(received.to_dict())) == (type(found), sent)


def make(config: Config, job: ShardJob) -> ShardInfo:
    return ShardInfo.from_dict(make_shard.run(config, job.take_held_out, job.shard))


def test_many_shards_are_left_to_other_processes_and_then_found(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, **SMALL)
    found = prepare_or_list(config)
    assert isinstance(found, MissingShards)
    check_wire(found)
    assert len(found.jobs) > 2
    for job in found.jobs:
        assert make(config, job).key == job.shard["key"]
    prepared = prepare_or_list(config)
    assert isinstance(prepared, Preparation)
    assert prepared.num_made == 0
    check_wire(prepared)
    assert run(config, makes_all=False) == prepared.to_dict()
    anew = prepare(tiny_config(tmp_path, **SMALL, data__cache_dir=str(tmp_path / "other")))
    inputs = replace(anew.inputs, splits=prepared.inputs.splits, eval_split=prepared.inputs.eval_split)
    assert prepared == replace(anew, inputs=inputs, num_made=0)


def test_a_streamed_run_names_its_shards_in_the_order_in_which_it_needs_them(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, **SMALL, data__preparation="stream")
    prepared = prepare(config)
    assert prepared.to_stream is not None
    check_wire(prepared)
    jobs, (split,) = prepared.to_stream.jobs, prepared.inputs.splits
    assert (split.is_complete, split.num_shards, split.max_tokens) == (False, len(jobs), config.data.seq_len)
    assert (prepared.inputs.max_steps, prepared.inputs.num_positions) == (6, 48)
    assert [job.window for job in jobs] == [(0, index // 8) for index in range(len(jobs))]
    made = make(config, jobs[0])
    later = prepare(config).to_stream
    assert later == StreamedShards(jobs[1:], (MadeShard(Window(0, 0), made.counts.num_sequences),))
    check_wire(prepare(config))


def test_a_resumed_rank_is_handed_the_sizes_of_the_shards_that_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path, **SMALL, data__preparation="stream")
    first = prepare(config)
    assert first.to_stream is not None
    *jobs, last = first.to_stream.jobs
    sizes = {job.shard["key"]: make(config, job).counts.num_sequences for job in jobs}
    (sent,) = json.loads(json.dumps(prepare(config).inputs.to_dict()))["splits"]
    split = PreparedSplit.from_dict(sent)
    shards = open_split(split, config.data.loader)
    asked: list[str] = []

    def count(store: Store, key: str) -> ShardInfo:
        asked.append(key)
        return read_info(store, key)

    monkeypatch.setattr(cache, "read_info", count)
    keys = split.read_keys()
    known = [index for index, key in enumerate(keys) if key in sizes]
    assert shards.num_sequences(np.array(known)).tolist() == [sizes[keys[index]] for index in known]
    assert asked == []
    late = make(config, last)
    assert shards.num_sequences(np.array([keys.index(late.key)])).tolist() == [late.counts.num_sequences]
    assert asked == [late.key]


@pytest.mark.parametrize("held_out", [{}, {"data__eval": 0.3}], ids=["source", "fraction"])
def test_a_source_is_listed_once_for_curation_training_and_held_out_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held_out: dict[str, Any]
) -> None:
    config = tiny_config(tmp_path, data__curation={"exact": True, "against_eval": True}, **held_out)
    sources = [source.source for source in [*config.data.train, *config.data.eval_sources.values()]]
    listed: list[str] = []
    real = listing._local_files

    def count(source: RowSource) -> list[SourceFile]:
        listed.append(source.source)
        return real(source)

    monkeypatch.setattr(listing, "_local_files", count)
    assert prepare(config).inputs.eval_split is not None
    assert listed == sources


def test_named_sets_share_the_shards_of_all_held_out_rows_and_survive_the_wire(tmp_path: Path) -> None:
    one = prepare(tiny_config(tmp_path)).inputs
    held_out = str(tmp_path / "eval.jsonl")
    sets = {"whole": {"source": held_out}, "some": {"source": held_out, "rows": [2, 5]}}
    config = tiny_config(tmp_path, data__eval={"sources": sets})
    prepared = prepare(config)
    check_wire(prepared)
    inputs = prepared.inputs
    assert (inputs.splits, inputs.fingerprint) == (one.splits, one.fingerprint)
    assert inputs.measured_sets["whole"] == one.measured_sets[""] == one.eval_split
    rows = {name: split.known_counts.num_rows for name, split in inputs.measured_sets.items()}
    assert rows == {"whole": 7, "some": 3}
    assert inputs.eval_split is not None and inputs.eval_split.known_counts.num_rows == 10
    assert sorted(inputs.eval_split.read_keys()) == sorted(k for s in inputs.eval_sets.values() for k in s.read_keys())


@pytest.mark.parametrize("count", [1, 7, 40])
def test_a_number_of_rows_is_held_out_and_the_others_are_trained(tmp_path: Path, count: int) -> None:
    config = tiny_config(tmp_path, data__eval=count)
    inputs = prepare(config).inputs
    assert inputs.eval_split is not None
    assert inputs.eval_split.known_counts.num_rows == count
    assert [split.known_counts.num_rows for split in inputs.splits] == [41 - count]
    fraction = with_fraction(config).data.eval
    assert prepare(tiny_config(tmp_path, data__eval=fraction)).inputs == inputs
    shown = measure(config).splits
    assert [split.num_rows for split in shown] == [41 - count, count]


def test_a_number_of_all_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.eval=41 holds out all 41 rows of data.train"):
        prepare(tiny_config(tmp_path, data__eval=41))


@pytest.mark.parametrize("key", [0, 1, 2**53 + 1, 2**63 - 1, 2**64 - 4096])
def test_the_fraction_holds_out_its_row(key: int) -> None:
    below = math.nextafter(fraction_above(key), 0.0)
    assert key < int(fraction_above(key) * 2**64)
    assert key >= int(below * 2**64)


def test_shards_lie_below_the_runs_or_where_the_config_says(tmp_path: Path) -> None:
    assert cache_address(tiny_config(tmp_path)) == str(tmp_path / "runs" / ".dist-ft-cache" / "data")
    url = {"run__output_dir": "s3://bucket/runs"}
    assert cache_address(tiny_config(tmp_path, **url)) == "s3://bucket/runs/.dist-ft-cache/data"
    assert cache_address(tiny_config(tmp_path, **url, data__cache_dir=str(tmp_path))) == str(tmp_path)


def test_a_cache_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = tiny_config(tmp_path, data__cache_dir=str(tmp_path / "file" / "cache"))
    with pytest.raises(ConfigError, match=r"cannot be kept at .*file/cache.*set data\.cache_dir"):
        run(config)


def test_a_full_cache_directory_is_named_and_what_is_there_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, config = LocalStore.put, tiny_config(tmp_path, **SMALL)
    num_written = 0

    def full(self: LocalStore, name: str, parts: Iterable[bytes | memoryview]) -> None:
        nonlocal num_written
        num_written += 1
        if num_written > 8:
            raise OSError(errno.ENOSPC, "No space left on device", name)
        put(self, name, parts)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "put", full)
        with pytest.raises(ConfigError, match=r"No space left on device; free some space"):
            run(config)
    kept = len(list(Path(cache_address(config)).glob("*.json")))
    assert kept > 0
    found = prepare_or_list(config)
    assert isinstance(found, MissingShards)
    assert len(found.jobs) + kept == sum(split.num_shards for split in prepare(config).inputs.splits) + 1
