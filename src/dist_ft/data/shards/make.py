"""Makes one part of a source into one token shard, and publishes it whole.

Memory holds a window of rows. The shard is written to scratch and then put into the store, its description last, so
that a reader sees a whole shard or none. Claims (`claims.py`) keep two processes from making the same shard.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from dist_ft.data.curation.filters import describe_removed
from dist_ft.data.rows.scan import BadRow, Row
from dist_ft.data.shards.claims import kept, wait_for_claim
from dist_ft.data.shards.columns import Column
from dist_ft.data.shards.counts import Counts, first_unread
from dist_ft.data.shards.pack import PackedSequence, Window
from dist_ft.data.shards.request import PlannedShard, SplitRequest, is_window_full, rows_of_shard
from dist_ft.data.shards.shard_file import ARROW, INDEX, INFO, ShardInfo, ShardWriter, read_info
from dist_ft.errors import ConfigError, DataError
from dist_ft.printable import printable
from dist_ft.records import ANSWER_START, Record, Sample
from dist_ft.storage.store import Store, file_parts
from dist_ft.storage.urls import redacted

_READERS = 32
_MAX_KEPT_CHARACTERS = 10_000
"""Characters of a bad row that are kept in the quarantine."""


def quarantine_name(key: str) -> str:
    """Return the name of a shard's bad rows in the store."""
    return f"{key}.quarantine.jsonl"


@contextmanager
def cache_errors(address: str) -> Iterator[None]:
    """Turn an error of the token shards' store or the scratch directory into one that names them.

    Raises:
        ConfigError: The store or the directory refused; the message says why and what to do.
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
    """Make a shard, unless it exists or another process makes it, and return its description.

    Raises:
        DataError: A row cannot be used (the message names file and line), or the file has changed.
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
    """Return the descriptions of shards that all exist. Reads many at a time, because an object store is slow."""
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(partial(read_info, store), keys))


def find_info(store: Store, key: str) -> ShardInfo | None:
    """Return the description of a shard; None if the shard is not made yet."""
    try:
        return read_info(store, key)
    except FileNotFoundError:
        return None


def check_bad_rows(request: SplitRequest, info: ShardInfo, store: Store) -> None:
    """Refuses a shard that was made without its bad rows, if bad rows are an error now.

    Raises:
        DataError: The shard has bad rows; the message names the first.
    """
    if info.counts.num_bad_rows and request.bad_rows == "error":
        first = _first_bad_row(store, [info.key])
        raise DataError(f"{first['place']}: {first['problem']}")


def _write(request: SplitRequest, shard: PlannedShard, render_many: RenderMany, store: Store, scratch: Path) -> None:
    """Write a shard to scratch, then put its files into the store; bad rows raise or go to the quarantine."""
    counts, quarantine = Counts(), scratch / quarantine_name(shard.key)
    window, num_rows, num_tokens = Window(columns=request.columns), 0, 0
    columns = [Column(name) for name in request.columns]
    with ShardWriter(scratch, shard.key, columns, request.counts_samples) as writer:
        for row, outcome in render_rows(rows_of_shard(request, shard), render_many):
            if isinstance(outcome, BadRow):
                if request.bad_rows == "error":
                    raise outcome.error()
                counts += Counts(num_bad_rows=1)
                _put_aside(outcome, quarantine)
                continue
            samples, found = fit(outcome, row, request)
            counts += found
            num_rows += 1
            for sample in samples:
                window.add(sample)
                num_tokens += len(sample.input_ids)
            if is_window_full(num_rows, num_tokens):
                writer.add(sequences_of(window, request))
                window, num_rows, num_tokens = Window(columns=request.columns), 0, 0
        writer.add(sequences_of(window, request))
        writer.close(counts)
    for path in (quarantine, *(scratch / f"{shard.key}{ending}" for ending in (ARROW, INDEX, INFO))):
        if path.exists():
            store.put(path.name, file_parts(path))


def sequences_of(window: Window, request: SplitRequest) -> Iterator[PackedSequence]:
    """Yield the sequences of a full window."""
    samples = window.with_mismatched(request.seq_len) if request.adds_mismatched else window
    return samples.sequences(request.seq_len, request.packing, request.rows_per_slot)


def _put_aside(row: BadRow, quarantine: Path) -> None:
    text = row.raw if isinstance(row.raw, str) else json.dumps(row.raw, default=str)
    entry = {"place": row.place, "problem": row.problem, "row": text[:_MAX_KEPT_CHARACTERS]}
    with quarantine.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")  # as ASCII, so that no control character reaches a terminal


def check_trained(request: SplitRequest, counts: Counts, store: Store, keys: list[str]) -> None:
    """Refuses a split in which nothing is trained.

    Raises:
        DataError: No token is trained; the message gives the likely reason.
    """
    if counts.num_trained_tokens:
        return
    if counts.num_bad_rows and counts.num_rows == 0:
        first = _first_bad_row(store, keys)
        raise DataError(
            f"{request.shown}: all {counts.num_bad_rows} rows are bad; the first is {first['place']}: "
            f"{first['problem']}"
        )
    if counts.num_rows == 0 and len(request.removed.numbers):
        rules = describe_removed(request.removed.counts)
        raise DataError(f"{request.shown}: data.curation and max_rows leave out every row ({rules}); ask for less")
    if counts.num_rows == 0 and not request.held_out:
        raise DataError(f"{request.shown} holds no rows; expected one conversation or text a row")
    if counts.num_rows == 0:
        part = "held-out" if request.take_held_out else "training"
        raise DataError(
            f"{request.shown}: no rows fall on the {part} side with data.eval={request.held_out}; use another fraction"
        )
    raise DataError(
        f"{request.shown}: none of {counts.num_rows} rows has a trained token ({counts.num_long_samples} samples are "
        f"longer than data.seq_len={request.seq_len}, data.long_samples={request.long_samples}); raise it or check the "
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
"""Returns for each record its samples, or the error that the template raised."""
Rendered = tuple[Row | BadRow, list[Sample] | BadRow]


def render_rows(rows: Iterable[Row | BadRow], render_many: RenderMany) -> Iterator[Rendered]:
    """Yield every row in order, with its samples or its problem."""
    for batch in _batches(rows):
        outcomes = iter(render_many([row.record for row in batch if isinstance(row, Row)]))
        for row in batch:
            if isinstance(row, BadRow):
                yield row, row
                continue
            found = next(outcomes)
            if isinstance(found, DataError):
                yield row, BadRow(row.location, printable(str(found)), row.raw)
            else:
                yield row, found


def _batches(rows: Iterable[Row | BadRow]) -> Iterator[list[Row | BadRow]]:
    batch: list[Row | BadRow] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += sum(len(text) for _, text in row.record.role_texts()) if isinstance(row, Row) else 0
        if len(batch) == _BATCH_ROWS or size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def fit(samples: Sequence[Sample], row: Row | BadRow, request: SplitRequest) -> tuple[list[Sample], Counts]:
    """Return the trained samples of a row, none longer than a sequence, and the counts of the row.

    The samples of a slot with several rows are used together or not at all.

    Raises:
        DataError: A sample is longer than a sequence, and `data.long_samples` is `error`.
    """
    long = [sample for sample in samples if len(sample.input_ids) > request.seq_len]
    if long and request.long_samples == "error":
        raise DataError(
            f"{row.place}: {len(long[0].input_ids)} tokens are longer than data.seq_len={request.seq_len}, and "
            "data.long_samples=error; raise data.seq_len, shorten the row, or set data.long_samples to truncate, drop "
            "or split"
        )
    pieces = [usable(sample, request) for sample in samples]
    if request.samples_per_record is not None and [len(some) for some in pieces] != [1] * request.samples_per_record:
        pieces = []
    kept = [piece for some in pieces for piece in some]
    is_untrained = not kept and not (long and request.long_samples == "drop")
    num_unended = sum(sample.num_unended for sample in samples) if kept else 0
    counts = Counts(
        num_rows=1,
        num_untrained_rows=int(is_untrained),
        num_long_samples=len(long),
        num_unended=num_unended,
        unread=first_unread(row.unread) if isinstance(row, Row) else (),
    )
    return kept, counts


def usable(sample: Sample, request: SplitRequest) -> list[Sample]:
    """Return the pieces of a sample that a run uses: none longer than a sequence or without a trained token."""
    length = len(sample.input_ids)
    if length > request.seq_len and request.long_samples == "drop":
        return []
    ends = length if request.long_samples == "split" else 1
    starts = range(0, ends, request.seq_len)
    spans = [slice(start, start + request.seq_len) for start in starts]
    pieces = [replace(sample, input_ids=sample.input_ids[span], trained=sample.trained[span]) for span in spans]
    # Where the prompt is trained, too, a piece without any of the answer is of no use.
    border = int(sample.numbers.get(ANSWER_START, 0))
    return [piece for piece in pieces if any(piece.trained[1:]) and len(piece.input_ids) > border]
