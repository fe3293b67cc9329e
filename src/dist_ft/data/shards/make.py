"""Makes one part of a source into one token shard, and publishes it whole.

Memory holds a window of rows. The shard is written to scratch and then put into the store, its description last: a
reader sees a whole shard or none. Never made twice: see `claims.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from dist_ft.data.rows.scan import BadRow
from dist_ft.data.shards.claims import kept, wait_for_claim
from dist_ft.data.shards.exclusions import describe_removed
from dist_ft.data.shards.pack import Window
from dist_ft.data.shards.render_batches import RenderMany, render_rows
from dist_ft.data.shards.request import SplitRequest, is_window_full
from dist_ft.data.shards.samples import Counts, fit
from dist_ft.data.shards.shard_file import ARROW, INDEX, INFO, ShardInfo, ShardWriter, read_info
from dist_ft.data.shards.split_plan import PlannedShard, rows_of_shard
from dist_ft.errors import ConfigError, DataError
from dist_ft.records import Sample
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
            writer.add(window.sequences(request.seq_len, request.packing))
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
