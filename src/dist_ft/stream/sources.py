"""Reads raw rows and says exactly where a bad one stands.

Rows are chat conversations (`messages`) from local JSONL files or from the embedded data sets. Turning them
into tokens is the renderer's work, which `cache.py` gets as an argument.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from dist_ft.config.rules import EMBEDDED_PREFIX
from dist_ft.errors import DataError
from dist_ft.printable import printable
from dist_ft.records import ROLES, Conversation, Message, Record
from dist_ft.stream.embedded import embedded_rows

_QUOTED = 80
"""Characters of a bad row that an error shows."""


@dataclass(frozen=True)
class Row:
    """One row of a source.

    Attributes:
        place: `file:line`, for messages to people.
        record: What it says.
        key: Hash of the content, which decides on which side of a held-out split it falls.
    """

    place: str
    record: Record
    key: int


@dataclass(frozen=True)
class Problem:
    """A row that cannot be used.

    Attributes:
        place: `file:line`.
        message: One line for people, which begins with the place.
    """

    place: str
    message: str


def read_rows(source: str, row_format: str = "auto") -> Iterator[Row]:
    """Yields the conversations of a source in file order.

    Raises:
        DataError: Broken JSON, a row that is no conversation or has no assistant turn (file and line named),
            or a source without rows.
    """
    count = 0
    for row in scan_rows(source, row_format):
        if isinstance(row, Problem):
            raise DataError(row.message)
        yield row
        count += 1
    if count == 0:
        raise DataError(f"{source} holds no rows; expected one JSON object with `messages` a line")


def scan_rows(source: str, row_format: str = "auto") -> Iterator[Row | Problem]:
    """Yields every row of a source in file order, those that cannot be used as what is wrong with them.

    Raises:
        DataError: The source as a whole cannot be read.
    """
    if row_format not in ("auto", "messages"):
        raise DataError(f"format={row_format} of {source} is not supported yet; convert to rows with `messages`")
    for place, data in _raw_rows(source):
        try:
            messages = _check_row(place, _parse(place, data) if isinstance(data, bytes) else data)
        except DataError as error:
            yield Problem(place, str(error))
            continue
        key = xxhash.xxh3_64_intdigest(json.dumps(messages, sort_keys=True).encode())
        yield Row(place, Conversation(messages), key)


def is_held_out(row: Row, fraction: float) -> bool:
    """Whether a row falls on the held-out side; by content, so that copies of a row fall on the same side."""
    return row.key < int(fraction * 2**64)


def content_hash(source: str) -> str:
    """Returns the hash of a source's bytes (xxh3-128), the base of its cache key."""
    hasher = xxhash.xxh3_128()
    if source.startswith(EMBEDDED_PREFIX):
        hasher.update(json.dumps(embedded_rows(source.removeprefix(EMBEDDED_PREFIX))).encode())
    else:
        with _open(source) as file:
            while chunk := file.read(1 << 22):
                hasher.update(chunk)
    return hasher.hexdigest()


def _raw_rows(source: str) -> Iterator[tuple[str, Any]]:
    """Yields (place, row); rows of files as the bytes of their line."""
    if source.startswith(EMBEDDED_PREFIX):
        for index, row in enumerate(embedded_rows(source.removeprefix(EMBEDDED_PREFIX))):
            yield f"{source}:{index + 1}", row
        return
    with _open(source) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{source}:{number}", line


def _parse(place: str, line: bytes) -> Any:
    try:
        return json.loads(line)
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not valid UTF-8 ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{place}: not valid JSON: {error.msg} (column {error.colno}); expected one object a line"
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets as deep
        raise DataError(f"{place}: not usable JSON: {error}; expected one object a line") from error


def _open(source: str) -> BinaryIO:
    try:
        return Path(source).open("rb")
    except OSError as error:
        raise DataError(
            f"{source} cannot be read: {error.strerror}; all machines must see it under this path"
        ) from error


def _check_row(place: str, data: Any) -> list[Message]:
    if not isinstance(data, dict) or "messages" not in data:
        keys = f"keys {_quote(sorted(data))}" if isinstance(data, dict) else type(data).__name__
        raise DataError(f"{place}: found {keys}, expected an object with `messages`")
    messages = data["messages"]
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{place}: `messages` is {_quote(messages)}, expected a list of turns")
    for number, turn in enumerate(messages):
        if not isinstance(turn, dict) or turn.get("role") not in ROLES or not isinstance(turn.get("content"), str):
            raise DataError(
                f"{place}: turn {number} is {_quote(turn)}, expected text content and a role of {', '.join(ROLES)}"
            )
        try:
            turn["content"].encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{place}: turn {number} holds half a character ({error.reason}); remove or mend it"
            ) from error
    if not any(turn["role"] == "assistant" for turn in messages):
        raise DataError(f"{place}: no assistant turn, so nothing to learn from; remove the row or add the answer")
    return messages


def _quote(value: Any) -> str:
    """Returns the beginning of a value as it can be shown to people."""
    return printable(repr(value), _QUOTED)
