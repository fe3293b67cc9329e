"""What a run uses of the samples of a row. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dist_ft.data.rows.scan import BadRow, Row
from dist_ft.data.shards.request import SplitRequest
from dist_ft.errors import DataError
from dist_ft.records import Sample


@dataclass
class Counts:
    """What the rows of a part, or of a split, became. See `ShardInfo` for the meaning."""

    rows: int = 0
    untrained_rows: int = 0
    long_samples: int = 0
    bad_rows: int = 0


def fit(samples: Sequence[Sample], row: Row | BadRow, request: SplitRequest, counts: Counts) -> list[Sample]:
    """Returns the samples that are trained, none longer than a sequence.

    Raises:
        DataError: A sample is longer, and `data.long_samples` is `error`.
    """
    kept: list[Sample] = []
    num_dropped = 0
    for sample in samples:
        is_long = len(sample.input_ids) > request.seq_len
        counts.long_samples += is_long
        if is_long and request.long_samples == "error":
            raise DataError(_explain_long(row, len(sample.input_ids), request.seq_len))
        num_dropped += is_long and request.long_samples == "drop"
        kept += usable(sample, request)
    counts.untrained_rows += not kept and not num_dropped
    return kept


def usable(sample: Sample, request: SplitRequest) -> list[Sample]:
    """Returns what a run uses of a sample: no piece longer than a sequence, none without a trained token."""
    length = len(sample.input_ids)
    if length > request.seq_len and request.long_samples == "drop":
        return []
    ends = length if request.long_samples == "split" else 1
    pieces = [_cut(sample, start, request.seq_len) for start in range(0, ends, request.seq_len)]
    return [piece for piece in pieces if any(piece.trained[1:])]


def _cut(sample: Sample, start: int, length: int) -> Sample:
    end = start + length
    return Sample(sample.input_ids[start:end], sample.trained[start:end])


def _explain_long(row: Row | BadRow, length: int, seq_len: int) -> str:
    return (
        f"{row.place}: {length} tokens are longer than data.seq_len={seq_len}, and data.long_samples=error; raise "
        "data.seq_len, shorten the row, or set data.long_samples to truncate, drop or split"
    )
