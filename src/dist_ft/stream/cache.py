"""Turns sources into token shards once, under a key of everything that changes tokens.

A prepared split is a directory `<cache_dir>/<key>/` with token shards and `prepared.json`, renamed into place
when whole: a reader sees all of it or nothing, and two writers of the same key write the same shards. Rows that
were left out as bad lie beside the shards in `quarantine.jsonl`.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import xxhash

from dist_ft.config.schema import RowSource
from dist_ft.errors import DataError
from dist_ft.printable import printable
from dist_ft.records import Record, Sample
from dist_ft.rundir import read_json, write_json
from dist_ft.storage.remote import shown_url
from dist_ft.stream.left_out import QUARANTINE
from dist_ft.stream.pack import pack
from dist_ft.stream.shards import TokenShards, write_shard
from dist_ft.stream.sources import BadRow, Row, content_hash, is_held_out, scan_rows

PREPARATION_VERSION = 3
"""Part of every cache key; raised when the same input would give other tokens or another `prepared.json`."""
WINDOW_ROWS = 8192
"""Rows of a source that become one token shard; packing never looks beyond."""

_MAX_KEPT_CHARACTERS = 10_000
"""Of a bad row in the quarantine."""

Render = Callable[[Record], list[Sample]]


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

    @property
    def shown(self) -> str:
        """The sources, for messages to people."""
        return ", ".join(shown_url(source.source) for source in self.sources)

    def key(self) -> str:
        """Returns the cache key: content and settings, not the path."""
        rows = [(content_hash(s), s.format, sorted(s.columns.items())) for s in self.sources]
        settings = [
            PREPARATION_VERSION, WINDOW_ROWS, self.seq_len, self.packing, self.render_key, self.held_out,
            self.take_held_out, self.group_by, self.long_samples, self.bad_rows,
        ]  # fmt: skip
        return xxhash.xxh3_128_hexdigest(f"{rows} {settings}".encode())


@dataclass(frozen=True)
class PreparedSplit:
    """A split on disk. All counts are of the whole split.

    Attributes:
        directory: Where the shards lie.
        key: Cache key; two splits with the same key hold the same sequences.
        num_shards: Token shards.
        num_rows: Rows used, those that give no trained token included.
        num_sequences: Sequences after packing.
        num_tokens: Tokens of all sequences.
        num_trained_tokens: Tokens whose prediction is trained.
        num_untrained_rows: Rows left out because no token of theirs would be trained.
        num_long_samples: Samples longer than `seq_len`, treated as `data.long_samples` says.
        num_bad_rows: Rows left out because they cannot be used; they are in `quarantine.jsonl`.
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
    num_long_samples: int
    num_bad_rows: int
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
        DataError: A row that cannot be used (file and line named), or not one trained token in the whole split.
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


def _put_in_place(scratch: Path, directory: Path) -> None:
    try:
        scratch.rename(directory)
    except OSError:
        if not (directory / "prepared.json").exists():  # not another writer's, so nobody reads it
            shutil.rmtree(directory, ignore_errors=True)
            scratch.rename(directory)


def _write(request: SplitRequest, render: Render, directory: Path, key: str) -> PreparedSplit:
    counts = dict.fromkeys(("rows", "sequences", "tokens", "trained", "untrained", "long", "bad", "longest", "most"), 0)
    rendered = _render_rows(request, render, directory, counts)
    num_shards = 0
    while window := list(islice(rendered, WINDOW_ROWS)):
        samples = [sample for of_row in window for sample in of_row]
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
        raise DataError(_explain_untrained(request, counts, directory))
    return PreparedSplit(
        directory=str(directory), key=key, num_shards=num_shards, num_rows=counts["rows"],
        num_sequences=counts["sequences"], num_tokens=counts["tokens"], num_trained_tokens=counts["trained"],
        num_untrained_rows=counts["untrained"], num_long_samples=counts["long"], num_bad_rows=counts["bad"],
        max_tokens=counts["longest"], max_trained_tokens=counts["most"],
    )  # fmt: skip


def _render_rows(
    request: SplitRequest, render: Render, directory: Path, counts: dict[str, int]
) -> Iterator[list[Sample]]:
    """Yields the samples of each row; bad rows stop the work, or are put aside."""
    for row in rows_of_side(request):
        samples = render_row(row, render)
        if isinstance(samples, list):
            counts["rows"] += 1
            yield _fit(samples, row, request, counts)
        elif request.bad_rows == "error":
            raise samples.error()
        else:
            counts["bad"] += 1
            _put_aside(samples, directory)


def render_row(row: Row | BadRow, render: Render) -> list[Sample] | BadRow:
    """Returns the samples of a row, or what is wrong with it."""
    if isinstance(row, BadRow):
        return row
    try:
        return render(row.record)
    except DataError as error:  # the template refuses it
        return BadRow(row.where, printable(str(error)), row.raw)


def rows_of_side(request: SplitRequest) -> Iterator[Row | BadRow]:
    """Keeps the rows of one side; without a held-out fraction, all. A row that is not understood has no side of its
    own and counts on the training side."""
    for row in chain.from_iterable(scan_rows(source, request.group_by) for source in request.sources):
        is_other_side = bool(request.held_out) and isinstance(row, Row) and is_held_out(row, request.held_out)
        if is_other_side == request.take_held_out:
            yield row


def _fit(samples: Sequence[Sample], row: Row | BadRow, request: SplitRequest, counts: dict[str, int]) -> list[Sample]:
    """Returns the samples that are trained, none longer than a sequence."""
    kept: list[Sample] = []
    num_dropped = 0
    for sample in samples:
        is_long = len(sample.input_ids) > request.seq_len
        counts["long"] += is_long
        if is_long and request.long_samples == "error":
            raise DataError(_explain_long(row.place, len(sample.input_ids), request.seq_len))
        num_dropped += is_long and request.long_samples == "drop"
        kept += usable(sample, request)
    counts["untrained"] += not kept and not num_dropped
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


def _put_aside(row: BadRow, directory: Path) -> None:
    text = row.raw if isinstance(row.raw, str) else json.dumps(row.raw, default=str)
    entry = {"place": row.place, "problem": row.problem, "row": text[:_MAX_KEPT_CHARACTERS]}
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / QUARANTINE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")  # as ASCII, so that no control character reaches a terminal


def _explain_long(place: str, length: int, seq_len: int) -> str:
    return (
        f"{place}: {length} tokens are longer than data.seq_len={seq_len}, and data.long_samples=error; raise "
        "data.seq_len, shorten the row, or set data.long_samples to truncate, drop or split"
    )


def _explain_untrained(request: SplitRequest, counts: dict[str, int], directory: Path) -> str:
    if counts["bad"] and counts["rows"] == 0:
        with (directory / QUARANTINE).open(encoding="utf-8") as file:
            first = json.loads(file.readline())
        return f"{request.shown}: all {counts['bad']} rows are bad; the first is {first['place']}: {first['problem']}"
    if counts["rows"] == 0:
        part = "held-out" if request.take_held_out else "training"
        return (
            f"{request.shown}: no rows fall on the {part} side with data.eval={request.held_out}; use another fraction"
        )
    return (
        f"{request.shown}: none of {counts['rows']} rows has a trained token ({counts['long']} samples are longer than "
        f"data.seq_len={request.seq_len}, data.long_samples={request.long_samples}); raise it or check the template"
    )
