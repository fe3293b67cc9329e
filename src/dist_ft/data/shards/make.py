"""Makes one part of a source into one token shard, and publishes it whole.

Memory holds a window of rows. The shard is written to scratch and then put into the store, its description last: a
reader sees a whole shard or none. Never made twice: see `claims.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from dist_ft.data.curation.filters import describe_removed
from dist_ft.data.rows.scan import BadRow, Row
from dist_ft.data.shards.claims import kept, wait_for_claim
from dist_ft.data.shards.pack import Window
from dist_ft.data.shards.request import PlannedShard, SplitRequest, is_window_full, rows_of_shard
from dist_ft.data.shards.shard_file import ARROW, INDEX, INFO, ShardInfo, ShardWriter, read_info
from dist_ft.errors import ConfigError, DataError
from dist_ft.printable import printable
from dist_ft.records import Completion, Record, Sample
from dist_ft.storage.store import Store, file_parts
from dist_ft.storage.urls import redacted

_READERS = 32
_MAX_KEPT_CHARACTERS = 10_000
"""Of a bad row in the quarantine."""


def quarantine_name(key: str) -> str:
    """Name of a shard's bad rows in the store."""
    return f"{key}.quarantine.jsonl"


@contextmanager
def cache_errors(address: str) -> Iterator[None]:
    """Turns what the store of token shards or the scratch directory refuses into one error that names them.

    Raises:
        ConfigError: With the reason and the way out.
    """
    try:
        yield
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise ConfigError(
            f"token shards cannot be kept at {redacted(address)}: {where}{error.strerror or error}; free some space "
            "there, or set data.cache_dir (and TMPDIR, where they are made) to another place"
        ) from error


def make_shard(request: SplitRequest, shard: PlannedShard, render_many: RenderMany, store: Store) -> ShardInfo:
    """Returns a shard, newly made unless it is there or another process makes it.

    Raises:
        DataError: A row that cannot be used (file and line named), or the file has changed.
        OSError: The store or the scratch directory refuses.
    """
    key = shard.key
    owner = wait_for_claim(store, key, lambda: find_info(store, key) is not None)
    if owner is not None:
        with kept(store, key, owner), TemporaryDirectory(prefix="dist-ft-shard-") as scratch:
            _write(request, shard, render_many, store, Path(scratch))
    info = read_info(store, key)
    check_bad_rows(request, info, store)
    return info


def read_infos(store: Store, keys: Sequence[str]) -> list[ShardInfo]:
    """Returns what shards hold that are all there; many are asked for at a time, for an object store takes its time."""
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(partial(read_info, store), keys))


def find_info(store: Store, key: str) -> ShardInfo | None:
    """Returns what a shard holds; None when it is yet to be made."""
    try:
        return read_info(store, key)
    except FileNotFoundError:
        return None


def check_bad_rows(request: SplitRequest, info: ShardInfo, store: Store) -> None:
    """Refuses a shard that was made when bad rows were left out, if they now are an error.

    Raises:
        DataError: With the first of them.
    """
    if info.num_bad_rows and request.bad_rows == "error":
        first = _first_bad_row(store, [info.key])
        raise DataError(f"{first['place']}: {first['problem']}")


def _write(request: SplitRequest, shard: PlannedShard, render_many: RenderMany, store: Store, scratch: Path) -> None:
    key = shard.key
    counts, quarantine = Counts(), scratch / quarantine_name(key)
    with ShardWriter(scratch, key) as writer:
        for window in _windows(_render_rows(request, shard, render_many, counts, quarantine)):
            writer.add(window.sequences(request.seq_len, request.packing, request.rows_per_slot))
        writer.close(
            num_rows=counts.rows,
            num_untrained_rows=counts.untrained_rows,
            num_long_samples=counts.long_samples,
            num_bad_rows=counts.bad_rows,
        )
    for path in (quarantine, *(scratch / f"{key}{ending}" for ending in (ARROW, INDEX, INFO))):
        if path.exists():
            store.put(path.name, file_parts(path))


def _windows(rows: Iterator[list[Sample]]) -> Iterator[Window]:
    """Gathers samples that are packed together."""
    window, num_rows, num_tokens = Window(), 0, 0
    for samples in rows:
        num_rows += 1
        for sample in samples:
            window.add(sample)
            num_tokens += len(sample.input_ids)
        if is_window_full(num_rows, num_tokens):
            yield window
            window, num_rows, num_tokens = Window(), 0, 0
    if len(window):
        yield window


def _render_rows(
    request: SplitRequest, shard: PlannedShard, render_many: RenderMany, counts: Counts, quarantine: Path
) -> Iterator[list[Sample]]:
    """Yields the samples of each row; bad rows stop the work, or are put aside."""
    for row, samples in render_rows(rows_of_shard(request, shard), render_many):
        if isinstance(samples, list):
            counts.rows += 1
            yield fit(samples, row, request, counts)
        elif request.bad_rows == "error":
            raise samples.error()
        else:
            counts.bad_rows += 1
            _put_aside(samples, quarantine)


def _put_aside(row: BadRow, quarantine: Path) -> None:
    text = row.raw if isinstance(row.raw, str) else json.dumps(row.raw, default=str)
    entry = {"place": str(row.place), "problem": row.problem, "row": text[:_MAX_KEPT_CHARACTERS]}
    with quarantine.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")  # as ASCII, so that no control character reaches a terminal


def check_trained(request: SplitRequest, num_trained: int, counts: Counts, store: Store, keys: list[str]) -> None:
    """Refuses a split in which nothing is trained.

    Raises:
        DataError: With the likely reason.
    """
    if num_trained:
        return
    if counts.bad_rows and counts.rows == 0:
        first = _first_bad_row(store, keys)
        raise DataError(
            f"{request.shown}: all {counts.bad_rows} rows are bad; the first is {first['place']}: {first['problem']}"
        )
    if counts.rows == 0 and len(request.removed.numbers):
        rules = describe_removed(request.removed.counts)
        raise DataError(f"{request.shown}: data.curation and max_rows leave out every row ({rules}); ask for less")
    if counts.rows == 0 and not request.held_out:
        raise DataError(f"{request.shown} holds no rows; expected one conversation or text a row")
    if counts.rows == 0:
        part = "held-out" if request.take_held_out else "training"
        raise DataError(
            f"{request.shown}: no rows fall on the {part} side with data.eval={request.held_out}; use another fraction"
        )
    raise DataError(
        f"{request.shown}: none of {counts.rows} rows has a trained token ({counts.long_samples} samples are longer "
        f"than data.seq_len={request.seq_len}, data.long_samples={request.long_samples}); raise it or check the "
        "template"
    )


def _first_bad_row(store: Store, keys: list[str]) -> dict[str, str]:
    for key in keys:
        try:
            return dict(json.loads(store.read(quarantine_name(key)).splitlines()[0]))
        except FileNotFoundError:
            continue
    raise AssertionError("bad rows were counted, but none was put aside")


_BATCH_ROWS = 256
_BATCH_CHARACTERS = 4 << 20

RenderMany = Callable[[Sequence[Record]], list[list[Sample] | DataError]]
"""Of each record its samples, or what the template says against it."""
Rendered = tuple[Row | BadRow, list[Sample] | BadRow]


def render_rows(rows: Iterable[Row | BadRow], render_many: RenderMany) -> Iterator[Rendered]:
    """Yields every row in order with its samples, or with what is wrong with it."""
    for batch in _batches(rows):
        outcomes = iter(render_many([row.record for row in batch if isinstance(row, Row)]))
        for row in batch:
            yield row, row if isinstance(row, BadRow) else _outcome(row, next(outcomes))


def _outcome(row: Row, found: list[Sample] | DataError) -> list[Sample] | BadRow:
    return BadRow(row.location, printable(str(found)), row.raw) if isinstance(found, DataError) else found


def _batches(rows: Iterable[Row | BadRow]) -> Iterator[list[Row | BadRow]]:
    batch: list[Row | BadRow] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += _characters(row.record) if isinstance(row, Row) else 0
        if len(batch) == _BATCH_ROWS or size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _characters(record: Record) -> int:
    """Returns about how long a record's text will be."""
    if isinstance(record, Completion):
        return len(record.prompt) + len(record.completion)
    return sum(len(message["content"]) for message in record.messages)


@dataclass
class Counts:
    """What the rows of a part, or of a split, became. See `ShardInfo` for the meaning."""

    rows: int = 0
    untrained_rows: int = 0
    long_samples: int = 0
    bad_rows: int = 0


def fit(samples: Sequence[Sample], row: Row | BadRow, request: SplitRequest, counts: Counts) -> list[Sample]:
    """Returns the samples that are trained, none longer than a sequence.

    The samples of a slot with several rows are used together or not at all.

    Raises:
        DataError: A sample is longer, and `data.long_samples` is `error`.
    """
    kept: list[list[Sample]] = []
    num_dropped = 0
    for sample in samples:
        is_long = len(sample.input_ids) > request.seq_len
        counts.long_samples += is_long
        if is_long and request.long_samples == "error":
            raise DataError(_explain_long(row, len(sample.input_ids), request.seq_len))
        num_dropped += is_long and request.long_samples == "drop"
        kept.append(usable(sample, request))
    if request.rows_per_slot > 1 and [len(pieces) for pieces in kept] != [1] * request.rows_per_slot:
        kept = []
    counts.untrained_rows += not any(kept) and not num_dropped
    return [piece for pieces in kept for piece in pieces]


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
