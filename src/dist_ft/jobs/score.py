"""Makes a token shard and what a frozen model says about it: a Ray task beside the preparation, or in mode `stream`.

A task loads the model, scores a shard in passes of rows of similar length, and writes the columns
(`data/shards/score_file.py`). The ranks find them beside the tokens, so no second model is in their memory and none is
sharded anew after a resize. A teacher's likeliest tokens are such columns, too: one entry a trained token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import xxhash

from dist_ft.config import Config
from dist_ft.data.shards.columns import Column, Numbers
from dist_ft.data.shards.make import cache_errors, read_infos
from dist_ft.data.shards.request import SplitPlan
from dist_ft.data.shards.score_file import ScoredBatch, make_scores, scores_name
from dist_ft.data.shards.shard_file import BATCH_SEQUENCES, ShardInfo
from dist_ft.data.shards.split import PreparedSplit, made_keys
from dist_ft.data.stream.cache import Replica, ShardCache
from dist_ft.data.stream.loader import RankLayout, micro_batch
from dist_ft.data.stream.token_shards import Row, TokenShards
from dist_ft.errors import ConfigError, DataError
from dist_ft.jobs import make_shard
from dist_ft.jobs.splits import cache_address
from dist_ft.machine import num_cores
from dist_ft.model.base import num_embedding_rows, skeleton
from dist_ft.model.frozen import check_frozen, check_same_tokens, frozen_config, frozen_key, load_frozen, named_by
from dist_ft.objectives.kinds import build_objective
from dist_ft.objectives.module import ObjectiveModule
from dist_ft.objectives.objective import Rows, Scorer
from dist_ft.storage.objects import open_store
from dist_ft.storage.store import Store
from dist_ft.storage.urls import shown_url

PASS_TOKENS = {"cpu": 1024, "cuda": 8192}
"""Tokens of a pass on a device, padding included; one long sequence may have more. More do not run faster."""


def run(
    config: Config, take_held_out: bool, shard: dict[str, Any], score_key: str, share: float = 1.0
) -> dict[str, Any]:
    """Make a shard and its scores; return the shard's `ShardInfo` as JSON values.

    Args:
        config: The run config.
        take_held_out: Whether the shard belongs to the held-out fraction.
        shard: A `PlannedShard` as JSON values.
        score_key: Key of the scorer, as the driver found it.
        share: Share of this machine's cores to use.

    Raises:
        DataError: See `make_shard`; also if the frozen model here is not the driver's.
        ConfigError: The store refuses.
    """
    torch.set_num_threads(max(1, int(num_cores() * share)))
    info = ShardInfo.from_dict(make_shard.run(config, take_held_out, shard))
    scorer = build_objective(config.objective).scorer
    assert scorer is not None
    if scorer_key(config, scorer) != score_key:
        raise DataError(
            f"{scorer.setting} is another model on this machine than at the driver; give all the same files"
        )
    FrozenModel(config, scorer, score_key).score(info)
    return info.to_dict()


def score_split(config: Config, split: PreparedSplit) -> PreparedSplit:
    """Make the missing scores of a split in this process; return the split with its scores.

    Raises:
        UserError: The frozen model does not fit.
    """
    scorer = build_objective(config.objective).scorer
    if scorer is None:
        return split
    check_scorer(config, scorer)
    frozen = FrozenModel(config, scorer, scorer_key(config, scorer))
    for info in read_infos(open_store(split.address), list(dict.fromkeys(split.read_keys()))):
        frozen.score(info)
    return replace(split, score_key=frozen.score_key)


class FrozenModel:
    """Scores token shards. The model is loaded when the first shard needs it.

    Args:
        config: The run config.
        scorer: What is scored.
        score_key: Key of the scorer.
    """

    def __init__(self, config: Config, scorer: Scorer, score_key: str) -> None:
        self._config, self._scorer, self.score_key = config, scorer, score_key
        self._objective = build_objective(config.objective)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._module: ObjectiveModule | None = None

    def score(self, info: ShardInfo) -> None:
        """Make the scores of a shard, unless they exist.

        Raises:
            ConfigError: The store refuses.
        """
        address = cache_address(self._config)
        with cache_errors(address):
            store = open_store(address)
            make_scores(info, self.score_key, self._scorer.columns, lambda: self._batches(info, address, store), store)

    def _batches(self, info: ShardInfo, address: str, store: Store) -> Iterator[ScoredBatch]:
        config, scorer = self._config, self._scorer
        if self._module is None:
            model = load_frozen(_frozen_of(config, scorer)).to(self._device)
            self._module = ObjectiveModule(model).eval()
        shards = TokenShards([info.key], ShardCache([Replica(shown_url(address), store)], config.data.loader))
        for begin in range(0, info.counts.num_sequences, BATCH_SEQUENCES):
            end = min(begin + BATCH_SEQUENCES, info.counts.num_sequences)
            sequences = [shards.read(0, row) for row in range(begin, end)]
            rows_per_slot = 1 if config.data.packing else self._objective.rows_per_slot
            yield score_sequences(self._module, scorer, sequences, rows_per_slot, self._device)


def score_sequences(
    module: ObjectiveModule, scorer: Scorer, sequences: Sequence[Row], rows_per_slot: int, device: torch.device
) -> ScoredBatch:
    """Return the entries of each column for each sequence; passes take sequences of similar length together."""
    scored: list[list[Numbers]] = [[column.empty()] * len(sequences) for column in scorer.columns]
    for slots in _passes([len(row.input_ids) for row in sequences], PASS_TOKENS[device.type]):
        members = [sequences[slot] for slot in slots]
        micro = micro_batch(members, slots, RankLayout(0, 1, len(slots), rows_per_slot))
        with torch.no_grad():
            entries = module(Rows.of(micro, device), scorer.score)
        for column, of_column, found in zip(scorer.columns, scored, entries, strict=True):
            counts = [_num_entries(column, row) for row in members]
            values = found.to(getattr(torch, column.dtype)).cpu().numpy()
            for slot, part in zip(slots, np.split(values, np.cumsum(counts)[:-1]), strict=True):
                of_column[slot] = part.reshape(-1)
    return scored


def _num_entries(column: Column, row: Row) -> int:
    return len(row.starts) if column.per == "sample" else int(row.trained.sum())


def _passes(lengths: Sequence[int], num_tokens: int) -> Iterator[list[int]]:
    """Yield the sequences of each pass, the longest first."""
    waiting = sorted(range(len(lengths)), key=lambda slot: (-lengths[slot], slot))
    while waiting:
        count = max(1, num_tokens // lengths[waiting[0]])
        yield waiting[:count]
        waiting = waiting[count:]


def scorer_key(config: Config, scorer: Scorer) -> str:
    """Return the key of a scorer: its frozen model, and what it writes down."""
    frozen = frozen_key(_frozen_of(config, scorer))
    return xxhash.xxh3_128_hexdigest(f"{frozen} {scorer.columns} {scorer.key}".encode())


def check_scorer(config: Config, scorer: Scorer) -> None:
    """Check that the frozen model is there and fits the run, without loading a weight.

    Raises:
        UserError: It is not; the message names the key of the config.
    """
    if scorer.model is None:
        return  # the run's own
    with named_by(scorer.setting):
        frozen = _frozen_of(config, scorer)
        check_frozen(frozen)
    check_same_tokens(config, frozen, scorer.setting)
    if scorer.num_likeliest and scorer.num_likeliest > (rows := num_embedding_rows(frozen)):
        raise ConfigError(
            f"objective.top_k={scorer.num_likeliest} is more than the {rows} tokens of {scorer.setting}="
            f"{scorer.model}; set objective.top_k <= {rows}"
        )


def num_frozen_params(config: Config, scorer: Scorer) -> int:
    """Return the parameters of the frozen model, without those of an adapter."""
    return sum(parameter.numel() for parameter in skeleton(_frozen_of(config, scorer)).parameters())


def _frozen_of(config: Config, scorer: Scorer) -> Config:
    return frozen_config(config, scorer.model, scorer.revision, scorer.is_of_run)


def missing_scores(plans: Sequence[SplitPlan], store: Store, score_key: str) -> set[str]:
    """Return the keys of the token shards whose scores are not made yet."""
    made = made_keys(store)
    keys = {shard.key for plan in plans for shard in plan.shards}
    return {key for key in keys if scores_name(key, score_key) not in made}
