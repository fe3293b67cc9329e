"""Turns a number of held-out rows (`data.eval: 200`) into the fraction that holds out so many."""

from __future__ import annotations

import json
import math
from array import array
from contextlib import suppress

import numpy as np
import xxhash

from dist_ft.config.data_sections import DataConfig
from dist_ft.data.rows.scan import Row, reading_key, scan_part
from dist_ft.data.sources.listing import list_sources
from dist_ft.data.sources.parts import Part, whole
from dist_ft.errors import DataError
from dist_ft.storage.store import Store

_VERSION = 1
"""Part of the key; raise it when the same rows would give another fraction."""


def with_fraction(data: DataConfig, store: Store) -> DataConfig:
    """Return the section with a fraction in place of a number of held-out rows; any other section as it is.

    The rows with the lowest hashes are held out. Copies of a row, and rows of a group, stay together, so that there may
    be a few more than asked for. It takes one pass over all rows.

    Args:
        data: The section.
        store: The store of token shards, which keeps the result.

    Raises:
        DataError: The sources have no more rows than that, or one cannot be read.
    """
    count = data.eval_count
    if count is None:
        return data
    parts = [whole(files, source.rows) for source, files in zip(data.train, list_sources(data).train, strict=True)]
    decisive = [
        _VERSION, count, data.group_by,
        [(part.identity(), source.format, sorted(source.columns.items()), reading_key(source, part))
         for source, part in zip(data.train, parts, strict=True)],
    ]  # fmt: skip
    name = f"held-out/{xxhash.xxh3_128_hexdigest(f'{decisive}'.encode())}.json"
    fraction = None
    with suppress(FileNotFoundError):
        fraction = float(json.loads(store.read(name))["fraction"])
    if fraction is None:
        fraction = _fraction(data, parts, count)
        store.put(name, [json.dumps({"fraction": fraction}).encode()])
    return data.model_copy(update={"eval": fraction})


def _fraction(data: DataConfig, parts: list[Part], count: int) -> float:
    keys = array("Q")
    for source, part in zip(data.train, parts, strict=True):
        keys.extend(row.key for row in scan_part(part, source, data.group_by) if isinstance(row, Row))
    ordered = np.sort(np.frombuffer(keys, dtype=np.uint64))
    if count >= len(ordered) or ordered[count - 1] == ordered[-1]:
        raise DataError(
            f"data.eval={count} holds out all {len(ordered):,} rows of data.train, so that none is trained; lower it, "
            "or name a source of its own"
        )
    return fraction_above(int(ordered[count - 1]))


def fraction_above(key: int) -> float:
    """Return the lowest fraction at which a row with this key is held out (`is_held_out`)."""
    fraction = (key + 1) / 2**64
    return fraction if key < int(fraction * 2**64) else math.nextafter(fraction, 1.0)
