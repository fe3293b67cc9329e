"""What a split will be made of, as the listing of its sources tells: its shards, each with its rows. Reads no row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from dist_ft.config.data_sections import RowSource, SourceConfig
from dist_ft.data.curation.filters import Numbers, without
from dist_ft.data.rows.scan import BadRow, Row, is_held_out, scan_part
from dist_ft.data.shards.request import SplitRequest, split_key
from dist_ft.data.sources.listing import list_files
from dist_ft.data.sources.parts import Part, cut_parts
from dist_ft.data.sources.source_file import SourceFile


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


def plan_split(request: SplitRequest) -> SplitPlan:
    """Lists the sources of a split and names its shards.

    Raises:
        DataError: A source cannot be listed.
    """
    files: list[SourceFile] = []
    shards: list[PlannedShard] = []
    for source in request.sources:
        listed = list_files(source)
        files += listed
        for index, part in enumerate(cut_parts(listed, request.part_bytes)):
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
