"""Describes how a split is made, and computes the keys of its token shards.

A key covers everything that changes tokens and nothing else: neither the path nor the time. It follows from the listing
of the sources, before a row is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import xxhash

from dist_ft.config.data_sections import RowSource, SourceConfig
from dist_ft.data.curation.filters import NOTHING, Numbers, Removed, without
from dist_ft.data.rows.scan import BadRow, Row, is_held_out, reading_key, scan_part
from dist_ft.data.shards.counts import first_unread
from dist_ft.data.sources.listing import list_files
from dist_ft.data.sources.parts import Part, cut_parts
from dist_ft.data.sources.source_file import SourceFile

PREPARATION_VERSION = 4
"""Part of every key; raise it when the same input would give other tokens or other files."""
WINDOW_ROWS = 8192
"""Most rows that are packed together; a window ends with its part at the latest."""
WINDOW_TOKENS = 1 << 22
"""A window ends early when it holds this many tokens, because it is kept in memory."""
_FIRST_ROWS = 256
"""Rows that are looked at before a run that prepares its data meanwhile."""


def is_window_full(num_rows: int, num_tokens: int) -> bool:
    """Return whether a window of this many rows and tokens is full, so that its rows are packed now."""
    return num_rows >= WINDOW_ROWS or num_tokens >= WINDOW_TOKENS


@dataclass(frozen=True)
class SplitRequest:
    """Describes a split to prepare.

    Attributes:
        sources: Sources of the rows, read one after the other.
        seq_len: `data.seq_len`.
        packing: `data.packing`.
        render_key: Key of the tokenizer, the template and everything else that decides the tokens of a row.
        held_out: Fraction of the rows kept for evaluation.
        take_held_out: Prepare that fraction instead of the rest.
        group_by: `data.group_by`.
        long_samples: `data.long_samples`.
        bad_rows: `data.bad_rows`.
        part_bytes: `data.part_mib` in bytes.
        removed: Rows that the config removes; only for a request with one source.
        rows_per_slot: Samples of a record that stay together in one sequence (`Objective.rows_per_slot`).
        columns: Names of the numbers that each sample has (`Sample.numbers`).
        adds_mismatched: Follow each sample by its prompt with the answer of the sample before
            (`Window.with_mismatched`); then a record has one sample, and a slot two.
    """

    sources: tuple[RowSource, ...]
    seq_len: int
    packing: bool
    render_key: str
    held_out: float = 0.0
    take_held_out: bool = False
    group_by: str | None = None
    long_samples: str = "truncate"
    bad_rows: str = "error"
    part_bytes: int = 32 << 20
    removed: Removed = NOTHING
    rows_per_slot: int = 1
    columns: tuple[str, ...] = ()
    adds_mismatched: bool = False

    @property
    def counts_samples(self) -> bool:
        """Whether the index has the number of samples of a sequence, by which the loss is divided."""
        return self.rows_per_slot > 1 or bool(self.columns) or self.adds_mismatched

    @property
    def samples_per_record(self) -> int | None:
        """Samples that a record must give to be used; None for any number."""
        if not self.counts_samples:
            return None
        return 1 if self.adds_mismatched else self.rows_per_slot

    @property
    def shown(self) -> str:
        """The names of the sources, for messages."""
        return ", ".join(source.source for source in self.sources)

    def part_key(self, source: RowSource, part: Part, removed: Numbers) -> str:
        """Return the key of the shard of a part without its removed rows.

        The key does not cover `data.bad_rows`: a shard without bad rows is the same either way, and a shard with some
        says so. A run that meets a bad row can therefore continue with `data.bad_rows: skip`.
        """
        how = [
            PREPARATION_VERSION, WINDOW_ROWS, WINDOW_TOKENS, source.format, sorted(source.columns.items()),
            self.seq_len, self.packing, self.render_key, self.held_out, self.take_held_out, self.group_by,
            self.long_samples, removed.tolist(),
            *([self.rows_per_slot, self.columns, self.adds_mismatched] if self.counts_samples else []),
            *reading_key(source, part),
        ]  # fmt: skip
        return xxhash.xxh3_128_hexdigest(f"{part.identity()} {how}".encode())


def split_key(shard_keys: Sequence[str]) -> str:
    """Return the key of a split. Two splits with the same key hold the same sequences."""
    return xxhash.xxh3_128_hexdigest(" ".join(shard_keys).encode())


@dataclass(frozen=True, eq=False)
class PlannedShard:
    """Describes a shard of a split, which may not be made yet.

    Attributes:
        key: Name of the shard in the store.
        source: Source of its rows.
        part: Part of the source that holds its rows.
        removed: Numbers of the rows that the config removes, counted in the part, ascending.
    """

    key: str
    source: RowSource
    part: Part
    removed: Numbers

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values for the process that makes the shard. Do not store them; see `Part.to_dict`."""
        source = self.source.model_dump(mode="json")
        return {"key": self.key, "source": source, "part": self.part.to_dict(), "removed": self.removed.tolist()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PlannedShard:
        """Inverse of `to_dict`."""
        removed = np.array(data["removed"], np.int64)
        return cls(data["key"], SourceConfig(**data["source"]), Part.from_dict(data["part"]), removed)


@dataclass(frozen=True, eq=False)
class SplitPlan:
    """Holds the plan of a split, which follows from the listing of its sources.

    Attributes:
        request: How the split is made.
        files: Files of all its sources, in order.
        shards: Shards in file order.
    """

    request: SplitRequest
    files: tuple[SourceFile, ...]
    shards: tuple[PlannedShard, ...]

    @cached_property
    def key(self) -> str:
        """Key of the split. Two splits with the same key hold the same sequences."""
        return split_key([shard.key for shard in self.shards])


def plan_split(request: SplitRequest, listed: Sequence[Sequence[SourceFile]] | None = None) -> SplitPlan:
    """Return the plan of a split, with the keys of its shards.

    Args:
        request: How the split is made.
        listed: Files of each of its sources; None lists them here.

    Raises:
        DataError: A source cannot be listed.
    """
    files: list[SourceFile] = []
    shards: list[PlannedShard] = []
    for source, found in zip(request.sources, listed or map(list_files, request.sources), strict=True):
        files += found
        for index, part in enumerate(cut_parts(found, request.part_bytes, source.rows)):
            removed = request.removed.of_part(index)
            shards.append(PlannedShard(request.part_key(source, part, removed), source, part, removed))
    return SplitPlan(request, tuple(files), tuple(shards))


def rows_of_shard(request: SplitRequest, shard: PlannedShard) -> Iterator[Row | BadRow]:
    """Yield the rows of a shard: the rows of its part that are not removed and are on the split's side.

    A bad row has no side of its own and belongs to the training side.
    """
    for row in without(scan_part(shard.part, shard.source, request.group_by), shard.removed):
        is_other_side = bool(request.held_out) and isinstance(row, Row) and is_held_out(row, request.held_out)
        if is_other_side == request.take_held_out:
            yield row


def rows_of_split(plan: SplitPlan) -> Iterator[Row | BadRow]:
    """Yield the rows of all shards."""
    for shard in plan.shards:
        yield from rows_of_shard(plan.request, shard)


def unread_of_first_rows(plan: SplitPlan) -> tuple[str, ...]:
    """Return the unread keys of the first rows of a split that a run starts before it is prepared."""
    rows = islice(rows_of_split(plan), _FIRST_ROWS)
    return first_unread(*(row.unread for row in rows if isinstance(row, Row)))
