"""What a preparation left out or cut, in words; the same ones wherever a split is shown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from dist_ft.config.data_sections import DataConfig
from dist_ft.data.curation.filters import describe_removed
from dist_ft.data.shards.split import PreparedSplit, quarantine_of

_LONG = {"truncate": "are cut", "drop": "are left out", "split": "are made into pieces"}


def describe_left_out(splits: Sequence[PreparedSplit], eval_split: PreparedSplit | None, data: DataConfig) -> list[str]:
    """Returns a line for each kind of loss, none where nothing was lost."""
    held_out = _lines([eval_split], data) if eval_split else ()
    return [*_lines(splits, data), *(f"held-out data: {line}" for line in held_out)]


def _lines(splits: Sequence[PreparedSplit], data: DataConfig) -> Iterator[str]:
    removed = sum((Counter(split.removed_rows) for split in splits), Counter[str]())
    if removed:
        yield f"{removed.total():,} rows are left out by data.curation and max_rows: {describe_removed(removed)}"
    untrained = sum(split.num_untrained_rows for split in splits)
    long = sum(split.num_long_samples for split in splits)
    with_bad = [split for split in splits if split.num_bad_rows]
    if untrained:
        yield f"{untrained:,} rows have no trained token and are left out"
    if long:
        yield f"{long:,} samples are longer than data.seq_len={data.seq_len} and {_LONG[data.long_samples]}"
    if with_bad:
        bad = sum(split.num_bad_rows for split in with_bad)
        paths = ", ".join(f"{split.address}/{quarantine_of(split.key)}" for split in with_bad)
        yield f"{bad:,} bad rows are left out; they are in {paths}"
