"""What a split is made of and how, and the keys under which its token shards are kept.

A key holds everything that changes tokens and nothing else: not the path, not the time. It is known from the listing of
the sources, before a row is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import xxhash

from dist_ft.config.data_sections import RowSource, SourceConfig
from dist_ft.data.curation.filters import NOTHING, Numbers, Removed, without
from dist_ft.data.rows.scan import BadRow, Row, is_held_out, scan_part
from dist_ft.data.sources.listing import list_files
from dist_ft.data.sources.parts import Part, cut_parts
from dist_ft.data.sources.source_file import SourceFile

PREPARATION_VERSION = 4
"""Part of every key; raised when the same input would give other tokens or other files."""
WINDOW_ROWS = 8192
"""Most rows that are packed together; a window ends with its part at the latest."""
WINDOW_TOKENS = 1 << 22
"""A window ends early once it holds so many tokens: it is kept in memory."""


def is_window_full(num_rows: int, num_tokens: int) -> bool:
    """Whether so many rows with so many tokens are to be packed now."""
    return num_rows >= WINDOW_ROWS or num_tokens >= WINDOW_TOKENS


@dataclass(frozen=True)
class SplitRequest:
    """What to prepare.

    Attributes:
        sources: Where the rows are; read one after the other.
        seq_len: `data.seq_len`.
        packing: `data.packing`.
        render_key: Of tokenizer, template and whatever else decides which tokens a row becomes.
        held_out: Fraction of the rows kept for evaluation.
        take_held_out: Prepare that fraction instead of the rest.
        group_by: `data.group_by`.
        long_samples: `data.long_samples`.
        bad_rows: `data.bad_rows`.
        part_bytes: `data.part_mib` in bytes.
        removed: Rows that the config leaves out, of a request with one source.
        rows_per_slot: Samples of a record that stay together in one sequence (`Objective.rows_per_slot`).
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

    @property
    def shown(self) -> str:
        """The sources, for messages to people."""
        return ", ".join(source.source for source in self.sources)

    def part_key(self, source: RowSource, part: Part, removed: Numbers) -> str:
        """Returns the key of the shard that a part becomes without some of its rows.

        What becomes of bad rows is not in it: a shard without any is the same either way, and one with some says so.
        A run that meets a bad row may therefore go on with `data.bad_rows: skip`.
        """
        how = [
            PREPARATION_VERSION, WINDOW_ROWS, WINDOW_TOKENS, source.format, sorted(source.columns.items()),
            self.seq_len, self.packing, self.render_key, self.held_out, self.take_held_out, self.group_by,
            self.long_samples, removed.tolist(),
            *([self.rows_per_slot] if self.rows_per_slot > 1 else []),
        ]  # fmt: skip
        return xxhash.xxh3_128_hexdigest(f"{part.identity()} {how}".encode())


def split_key(shard_keys: Sequence[str]) -> str:
    """Returns the key of a split: two splits with the same key hold the same sequences."""
    return xxhash.xxh3_128_hexdigest(" ".join(shard_keys).encode())


@dataclass(frozen=True, eq=False)
class PlannedShard:
    """A shard that a split has, made or not.

    Attributes:
        key: Its name in the store.
        source: Where its rows are.
        part: Which of them.
        removed: Numbers of those that the config leaves out, counted in the part, ascending.
    """

    key: str
    source: RowSource
    part: Part
    removed: Numbers

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON values for the process that makes it; nothing to keep, see `Part.to_dict`."""
        source = self.source.model_dump(mode="json")
        return {"key": self.key, "source": source, "part": self.part.to_dict(), "removed": self.removed.tolist()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PlannedShard:
        """Inverse of `to_dict`."""
        removed = np.array(data["removed"], np.int64)
        return cls(data["key"], SourceConfig(**data["source"]), Part.from_dict(data["part"]), removed)


@dataclass(frozen=True, eq=False)
class SplitPlan:
    """A split as its listing gives it.

    Attributes:
        request: How it is made.
        files: Of all its sources, in order.
        shards: In file order.
    """

    request: SplitRequest
    files: tuple[SourceFile, ...]
    shards: tuple[PlannedShard, ...]

    @cached_property
    def key(self) -> str:
        """Two splits with the same key hold the same sequences."""
        return split_key([shard.key for shard in self.shards])


def plan_split(request: SplitRequest, listed: Sequence[Sequence[SourceFile]] | None = None) -> SplitPlan:
    """Names the shards of a split.

    Args:
        request: How the split is made.
        listed: Files of each of its sources; None lists them.

    Raises:
        DataError: A source cannot be listed.
    """
    files: list[SourceFile] = []
    shards: list[PlannedShard] = []
    for source, found in zip(request.sources, listed or map(list_files, request.sources), strict=True):
        files += found
        for index, part in enumerate(cut_parts(found, request.part_bytes)):
            removed = request.removed.of_part(index)
            shards.append(PlannedShard(request.part_key(source, part, removed), source, part, removed))
    return SplitPlan(request, tuple(files), tuple(shards))


def rows_of_shard(request: SplitRequest, shard: PlannedShard) -> Iterator[Row | BadRow]:
    """Yields the rows of a shard: those of its part, without what is left out, on the split's side.

    A row that is not understood has no side of its own and counts on the training side.
    """
    for row in without(scan_part(shard.part, shard.source, request.group_by), shard.removed):
        is_other_side = bool(request.held_out) and isinstance(row, Row) and is_held_out(row, request.held_out)
        if is_other_side == request.take_held_out:
            yield row


def rows_of_split(plan: SplitPlan) -> Iterator[Row | BadRow]:
    """Yields the rows of all shards."""
    for shard in plan.shards:
        yield from rows_of_shard(plan.request, shard)
