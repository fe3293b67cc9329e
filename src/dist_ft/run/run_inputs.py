"""Defines what a run trains on: its prepared data, its length, and the fingerprint of its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dist_ft.data.shards.split import PreparedSplit
from dist_ft.slices import Fingerprint


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

    def to_dict(self) -> dict[str, Any]:
        """Returns the wire form."""
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
