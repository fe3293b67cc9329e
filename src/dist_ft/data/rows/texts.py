"""Computes what rows are compared by: the text for near copies, and a hash of the whole record for equal rows."""

from __future__ import annotations

import json

import xxhash

from dist_ft.records import Record

_INSTRUCTING = ("system", "developer")


def compared_text(record: Record) -> str:
    """Return the text in which near copies are found: all turns but instructions, which many rows share."""
    return "\n".join(text for role, text in record.role_texts() if role not in _INSTRUCTING)


def record_key(record: Record) -> int:
    """Return a 64-bit hash of a record; the order of its keys and other columns of the row do not matter.

    A record may hold other records.
    """
    return int(xxhash.xxh3_64_intdigest(json.dumps(vars(record), sort_keys=True, default=vars).encode()))
