"""What rows are compared by: the text that near copies share, and a hash of all that a record says."""

from __future__ import annotations

import json

import xxhash

from dist_ft.records import Record

_INSTRUCTING = ("system", "developer")


def compared_text(record: Record) -> str:
    """Returns the text by which near copies are found: all that is said but instructions, which many rows share."""
    return "\n".join(text for role, text in record.role_texts() if role not in _INSTRUCTING)


def record_key(record: Record) -> int:
    """Returns a 64-bit hash of what a record says, equal whatever the order of keys and the columns beside it."""
    return int(xxhash.xxh3_64_intdigest(json.dumps(vars(record), sort_keys=True).encode()))
