"""Parses JSON, and refuses what `json` silently loses: the first value of a key that stands twice in an object."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from dist_ft.printable import excerpt


def parse_json(text: str | bytes) -> Any:
    """Return the value that JSON text holds.

    Raises:
        ValueError: The text is not JSON (`json.JSONDecodeError`), or a key stands twice.
        RecursionError: It is nested too deeply.
    """
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"key {excerpt(twice)} stands twice; keep one")
    return made
