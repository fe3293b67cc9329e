"""Writes what a frozen model says about the sequences of a token shard, as a shard of columns of numbers.

Row by row it belongs to the token shard: `Column.per` says whether a sequence has an entry for each sample or for each
trained token. The key covers the token shard (so tokens and template) and the key of the scorer (so model, dtype and
columns). The files are published as those of token shards are, under claims, the description last. So a run may stop in
between, and two runs share the work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import xxhash

from dist_ft.data.shards.claims import kept, wait_for_claim
from dist_ft.data.shards.columns import Column, Numbers
from dist_ft.data.shards.counts import Counts
from dist_ft.data.shards.make import find_info
from dist_ft.data.shards.shard_file import ARROW, INFO, ArrowWriter, ShardInfo, read_info, schema_of
from dist_ft.storage.publish import write_json
from dist_ft.storage.store import Store, file_parts

SCORES_VERSION = 1
"""Part of every key; raise it when the same model would give other numbers."""

ScoredBatch = Sequence[Sequence[Numbers]]
"""The sequences of a record batch: for each column, the flat list of each sequence."""


def scores_name(shard_key: str, score_key: str) -> str:
    """Return the key of the scores of a token shard.

    Args:
        shard_key: Key of the token shard.
        score_key: Key of the scorer.
    """
    return xxhash.xxh3_128_hexdigest(f"{shard_key} {score_key} {SCORES_VERSION}".encode())


def make_scores(
    shard: ShardInfo,
    score_key: str,
    columns: Sequence[Column],
    score: Callable[[], Iterable[ScoredBatch]],
    store: Store,
) -> ShardInfo:
    """Make the scores of a token shard, unless they exist or another process makes them; return their description.

    Args:
        shard: The token shard.
        score_key: Key of the scorer.
        columns: What is scored.
        score: Yields the scores of `BATCH_SEQUENCES` sequences after another. It is called only if they are needed.
        store: The store of token shards.

    Raises:
        OSError: The store or the scratch directory refuses.
    """
    key = scores_name(shard.key, score_key)
    owner = wait_for_claim(store, key, lambda: find_info(store, key) is not None)
    if owner is not None:
        with kept(store, key, owner), TemporaryDirectory(prefix="dist-ft-scores-") as scratch:
            _write(shard, key, columns, score(), Path(scratch))
            for ending in (ARROW, INFO):
                store.put(f"{key}{ending}", file_parts(Path(scratch) / f"{key}{ending}"))
    return read_info(store, key)


def _write(
    shard: ShardInfo, key: str, columns: Sequence[Column], batches: Iterable[ScoredBatch], directory: Path
) -> None:
    arrow = ArrowWriter(directory / f"{key}{ARROW}", schema_of(columns, has_tokens=False))
    for batch in batches:
        arrow.write(batch)
    counts = Counts(num_sequences=shard.counts.num_sequences, num_tokens=shard.counts.num_tokens)
    info = ShardInfo(
        key=key, counts=counts, max_tokens=0, max_trained_tokens=0, num_index_bytes=0, index_hash="",
        columns=tuple(columns), **arrow.close()._asdict(),
    )  # fmt: skip
    write_json(directory / f"{key}{INFO}", info.to_dict())
