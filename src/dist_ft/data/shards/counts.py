"""What a preparation left out or cut, in words; the same ones wherever a split is shown.

Works on the dicts in which prepared splits travel, so that the driver need not load what reads them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dist_ft.config.data_sections import DataConfig


def quarantine_of(key: str) -> str:
    """Name, where the token shards are kept, of the rows of a split that were left out as bad: place, problem, row."""
    return f"splits/{key}.quarantine.jsonl"


_LONG = {"truncate": "are cut", "drop": "are left out", "split": "are made into pieces"}


def describe_left_out(
    splits: Sequence[dict[str, Any]], eval_split: dict[str, Any] | None, data: DataConfig
) -> list[str]:
    """Returns a line for each kind of loss, none where nothing was lost."""
    held_out = _lines([eval_split], data) if eval_split else ()
    return [*_lines(splits, data), *(f"held-out data: {line}" for line in held_out)]


def describe_removed(counts: Mapping[str, int]) -> str:
    """Returns `exact 1,000, near 12`: rows that the config leaves out, by rule."""
    return ", ".join(f"{rule} {count:,}" for rule, count in counts.items())


def _lines(splits: Sequence[dict[str, Any]], data: DataConfig) -> Iterator[str]:
    removed = sum((Counter(split["removed_rows"]) for split in splits), Counter[str]())
    if removed:
        yield f"{removed.total():,} rows are left out by data.curation and max_rows: {describe_removed(removed)}"
    untrained = sum(split["num_untrained_rows"] for split in splits)
    long = sum(split["num_long_samples"] for split in splits)
    with_bad = [split for split in splits if split["num_bad_rows"]]
    if untrained:
        yield f"{untrained:,} rows have no trained token and are left out"
    if long:
        yield f"{long:,} samples are longer than data.seq_len={data.seq_len} and {_LONG[data.long_samples]}"
    if with_bad:
        bad = sum(split["num_bad_rows"] for split in with_bad)
        paths = ", ".join(f"{split['address']}/{quarantine_of(split['key'])}" for split in with_bad)
        yield f"{bad:,} bad rows are left out; they are in {paths}"
