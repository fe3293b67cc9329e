"""Defines what a run trains on: its prepared data, its length, and the fingerprint of its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from dist_ft.data.shards.counts import Counts
from dist_ft.data.shards.split import PreparedSplit
from dist_ft.slices import Fingerprint
from dist_ft.storage.publish import read_json
from dist_ft.storage.urls import shown_url
from dist_ft.typed_json import from_json


@dataclass(frozen=True)
class SplitSummary:
    """What a source of the data holds, for people; data.json has one for each source.

    Attributes:
        source: The source, without secrets; `held-out` for the held-out rows.
        num_shards: Token shards.
        counts: What the rows became; None while shards are still to be made.
        removed_rows: Rows that `data.curation` and `max_rows` leave out, by rule.
    """

    source: str
    num_shards: int
    counts: Counts | None
    removed_rows: dict[str, int]


def summarise(sources: Sequence[str], inputs: RunInputs) -> list[SplitSummary]:
    """Return what each source holds, the held-out rows last."""
    named = [*zip(sources, inputs.splits, strict=False)]
    if inputs.eval_split is not None:
        named.append(("held-out", inputs.eval_split))
    return [SplitSummary(shown_url(name), s.num_shards, s.counts, s.removed_rows) for name, s in named]


def read_data_summary(path: Path) -> list[SplitSummary]:
    """Read data.json; empty where it is not there or of another version."""
    try:
        found = read_json(path)["splits"]
        return [from_json(SplitSummary, split) for split in found]
    except (OSError, ValueError, KeyError, TypeError):
        return []


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
        eval_sets: The parts of `eval_split` that `data.eval` names, by name.
    """

    splits: tuple[PreparedSplit, ...]
    eval_split: PreparedSplit | None
    fingerprint: Fingerprint
    max_steps: int
    num_positions: int
    commit: str | None = None
    eval_sets: Mapping[str, PreparedSplit] = field(default_factory=dict)

    @property
    def measured_sets(self) -> dict[str, PreparedSplit]:
        """The held-out sets by name. A single one has an empty name; there is none without held-out data."""
        if self.eval_sets or self.eval_split is None:
            return dict(self.eval_sets)
        return {"": self.eval_split}

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
            eval_sets={name: PreparedSplit.from_dict(split) for name, split in data["eval_sets"].items()},
        )
