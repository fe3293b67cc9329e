"""Turns sources into token shards once, under a key of everything that changes tokens.

A prepared split is a directory `<cache_dir>/<key>/` with token shards and `prepared.json`, renamed into place
when whole: a reader sees all of it or nothing, and two writers of the same key write the same shards.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import xxhash

from dist_ft.errors import DataError
from dist_ft.records import Record, Sample
from dist_ft.rundir import read_json, write_json
from dist_ft.stream.pack import pack
from dist_ft.stream.shards import TokenShards, write_shard
from dist_ft.stream.sources import Row, content_hash, is_held_out, read_rows

PREPARATION_VERSION = 2
"""Part of every cache key; raised when the same input would give other tokens or another `prepared.json`."""
WINDOW_ROWS = 8192
"""Rows of a source that become one token shard; packing never looks beyond."""

Render = Callable[[Record], list[Sample]]


@dataclass(frozen=True)
class SplitRequest:
    """What to prepare.

    Attributes:
        source: Path or embedded name.
        row_format: `data.train[].format`.
        seq_len: `data.seq_len`.
        packing: `data.packing`.
        render_key: Hash of tokenizer and template.
        held_out: Fraction of the rows kept for evaluation.
        take_held_out: Prepare that fraction instead of the rest.
    """

    source: str
    row_format: str
    seq_len: int
    packing: bool
    render_key: str
    held_out: float = 0.0
    take_held_out: bool = False

    def key(self) -> str:
        """Returns the cache key: content and settings, not the path."""
        settings = [
            PREPARATION_VERSION, WINDOW_ROWS, self.row_format, self.seq_len, self.packing, self.render_key,
            self.held_out, self.take_held_out,
        ]  # fmt: skip
        return xxhash.xxh3_128_hexdigest(f"{content_hash(self.source)} {settings}".encode())


@dataclass(frozen=True)
class PreparedSplit:
    """A split on disk. All counts are of the whole split.

    Attributes:
        directory: Where the shards lie.
        key: Cache key; two splits with the same key hold the same sequences.
        num_shards: Token shards.
        num_rows: Conversations read.
        num_sequences: Sequences after packing.
        num_tokens: Tokens of all sequences.
        num_trained_tokens: Tokens whose prediction is trained.
        num_untrained_rows: Conversations left out because no token of theirs would be trained.
        num_cut_samples: Samples longer than `seq_len`, cut at the end.
        max_tokens: Tokens of the longest sequence.
        max_trained_tokens: Most trained tokens of one sequence.
    """

    directory: str
    key: str
    num_shards: int
    num_rows: int
    num_sequences: int
    num_tokens: int
    num_trained_tokens: int
    num_untrained_rows: int
    num_cut_samples: int
    max_tokens: int
    max_trained_tokens: int

    def open(self) -> TokenShards:
        """Opens the shards for reading."""
        return TokenShards(Path(self.directory), self.num_shards)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PreparedSplit:
        """Inverse of `dataclasses.asdict`, extra keys ignored."""
        return cls(**{name: data[name] for name in cls.__dataclass_fields__})


def prepare_split(request: SplitRequest, render: Render, cache_dir: Path) -> PreparedSplit:
    """Returns the split, from the cache or newly made.

    Raises:
        DataError: A row that cannot be used, or not one trained token in the whole split.
    """
    key = request.key()
    directory = cache_dir / key
    if (directory / "prepared.json").exists():
        found = read_json(directory / "prepared.json")
        return PreparedSplit.from_dict({**found, "directory": str(directory)})
    scratch = cache_dir / f".{key}.{uuid.uuid4().hex[:8]}"
    try:
        split = _write(request, render, scratch, key)
        write_json(scratch / "prepared.json", asdict(split))
        _put_in_place(scratch, directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return PreparedSplit.from_dict({**asdict(split), "directory": str(directory)})


def read_split(request: SplitRequest) -> Iterator[Row]:
    """Yields the rows of a split in file order: of one side, or without a held-out fraction all.

    Raises:
        DataError: A row that cannot be used.
    """
    return (row for row in read_rows(request.source, request.row_format) if is_in_split(row, request))


def is_in_split(row: Row, request: SplitRequest) -> bool:
    """Whether a row of the source belongs to the split; without a held-out fraction, each does."""
    return request.held_out == 0 or is_held_out(row, request.held_out) == request.take_held_out


def fit(sample: Sample, seq_len: int) -> Sample | None:
    """Returns what a run uses of a sample: cut at the end, or None when no token of it would be trained."""
    kept = Sample(sample.input_ids[:seq_len], sample.trained[:seq_len])
    return kept if any(kept.trained[1:]) else None


def _put_in_place(scratch: Path, directory: Path) -> None:
    try:
        scratch.rename(directory)
    except OSError:
        if not (directory / "prepared.json").exists():  # not another writer's, so nobody reads it
            shutil.rmtree(directory, ignore_errors=True)
            scratch.rename(directory)


def _write(request: SplitRequest, render: Render, directory: Path, key: str) -> PreparedSplit:
    counts = dict.fromkeys(("rows", "sequences", "tokens", "trained", "untrained", "cut", "longest", "most"), 0)
    rows = read_split(request)
    num_shards = 0
    while window := list(islice(rows, WINDOW_ROWS)):
        samples = list(_render_window(window, render, request.seq_len, counts))
        if not samples:
            continue
        sequences = pack(samples, request.seq_len, request.packing)
        write_shard(directory, num_shards, sequences)
        num_shards += 1
        counts["sequences"] += len(sequences)
        counts["tokens"] += sum(len(s.input_ids) for s in sequences)
        trained = [sum(s.trained) for s in sequences]
        counts["trained"] += sum(trained)
        counts["longest"] = max(counts["longest"], *(len(s.input_ids) for s in sequences))
        counts["most"] = max(counts["most"], *trained)
    if counts["trained"] == 0:
        raise DataError(_explain_untrained(request, counts))
    return PreparedSplit(
        directory=str(directory), key=key, num_shards=num_shards, num_rows=counts["rows"],
        num_sequences=counts["sequences"], num_tokens=counts["tokens"], num_trained_tokens=counts["trained"],
        num_untrained_rows=counts["untrained"], num_cut_samples=counts["cut"],
        max_tokens=counts["longest"], max_trained_tokens=counts["most"],
    )  # fmt: skip


def _render_window(rows: Sequence[Row], render: Render, seq_len: int, counts: dict[str, int]) -> Iterator[Sample]:
    for row in rows:
        counts["rows"] += 1
        has_trained = False
        for sample in render(row.record):
            counts["cut"] += len(sample.input_ids) > seq_len
            kept = fit(sample, seq_len)
            if kept is not None:
                has_trained = True
                yield kept
        counts["untrained"] += not has_trained


def _explain_untrained(request: SplitRequest, counts: dict[str, int]) -> str:
    if counts["rows"] == 0:
        part = "held-out" if request.take_held_out else "training"
        return (
            f"{request.source}: no rows fall on the {part} side with data.eval={request.held_out}; use another fraction"
        )
    return (
        f"{request.source}: none of {counts['rows']} rows has a trained token "
        f"({counts['cut']} samples were cut at data.seq_len={request.seq_len}); raise it or check the template"
    )
