"""Defines what a run trains on: its prepared data, its length, and the fingerprint of its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from dist_ft.data.shards.split import PreparedSplit
from dist_ft.slices import Fingerprint


class ShardSize(NamedTuple):
    """The size of a shard that was made while the run goes on.

    Attributes:
        source: Number of the training source.
        place: Place of the shard in the source's order.
        num_sequences: Its sequences.
    """

    source: int
    place: int
    num_sequences: int


@dataclass(frozen=True)
class RunInputs:
    """Holds what the preparation found. The coordinator passes it to the ranks.

    Attributes:
        splits: Training sources, in config order.
        eval_split: Held-out split, or None.
        fingerprint: Mark that every checkpoint of the run carries.
        max_steps: Steps of the run.
        num_positions: Sequences that the run uses.
        commit: Commit of a hub model, which every rank loads.
    """

    splits: tuple[PreparedSplit, ...]
    eval_split: PreparedSplit | None
    fingerprint: Fingerprint
    max_steps: int
    num_positions: int
    commit: str | None = None

    def with_sizes(self, sizes: Sequence[ShardSize]) -> RunInputs:
        """Return the inputs with the sizes of shards that were made meanwhile."""
        new: list[dict[int, int]] = [{} for _ in self.splits]
        for size in sizes:
            new[size.source][size.place] = size.num_sequences
        return replace(self, splits=tuple(map(PreparedSplit.with_sizes, self.splits, new)))

    def to_dict(self) -> dict[str, Any]:
        """Return the wire form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RunInputs:
        """Inverse of `to_dict`, also after JSON; extra keys are ignored."""
        return cls(
            splits=tuple(map(PreparedSplit.from_dict, data["splits"])),
            eval_split=PreparedSplit.from_dict(data["eval_split"]) if data["eval_split"] else None,
            fingerprint=Fingerprint(**data["fingerprint"]),
            max_steps=data["max_steps"],
            num_positions=data["num_positions"],
            commit=data["commit"],
        )
