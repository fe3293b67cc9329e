"""Reads whether a turn is trained, from the flags that other tools write on turns, parts and spans. Pure.

A flag is true, false, 1 or 0; text is refused, because "false" is true in many languages. All flags of a turn must
say the same: a turn is trained as a whole, with the token that ends it, or not at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dist_ft.data.rows.keys import FLAG_KEYS, INVERSE_FLAG_KEYS, SPAN_KEYS
from dist_ft.errors import DataError
from dist_ft.printable import excerpt

_ALL_KEYS = frozenset((*FLAG_KEYS, *INVERSE_FLAG_KEYS, *SPAN_KEYS))


def read_weight(turn: Mapping[str, Any], role: str, parts: Sequence[Mapping[str, Any]], content: str) -> int | None:
    """Return 1 or 0 if the flags of an assistant turn say whether it is trained, and None without flags.

    Args:
        turn: The turn as the row has it.
        role: Its role, as records spell it.
        parts: The parts of its content, if that is a list.
        content: Its text.

    Raises:
        DataError: A flag is not understood, flags contradict one another or mark a part of the turn, or a turn of
            another role is to be trained.
    """
    if not parts and _ALL_KEYS.isdisjoint(turn):
        return None
    found = list(_flags(turn))
    if len({weight for _, weight in found}) > 1:
        raise DataError(f"{_names(found)} contradict one another; keep one")
    found += _span_flags(turn, content)
    if any(True for part in parts for _ in _flags(part)):
        found += [flag for part in parts if part.get("text") for flag in (list(_flags(part)) or [("text", 1)])]
    if not found:
        return None
    if len({weight for _, weight in found}) > 1:
        raise DataError(
            f"{_names(found)} mark only a part of the turn as trained, which is not supported; mark all of it"
        )
    name, weight = found[0]
    if role == "assistant":
        return weight
    if weight:
        raise DataError(f"`{name}` is 1 in a turn of role {role}; only assistant turns are trained")
    return None


def _flags(given: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for key in (*FLAG_KEYS, *INVERSE_FLAG_KEYS):
        value = given.get(key)
        if value is None:
            continue
        if not isinstance(value, int | float) or value not in (0, 1):
            raise DataError(f"`{key}` is {excerpt(value)}, expected 0 or 1, or true or false")
        yield key, int(not value if key in INVERSE_FLAG_KEYS else value)


def _span_flags(turn: Mapping[str, Any], content: str) -> Iterator[tuple[str, int]]:
    """Yield a flag for each span of Axolotl's lists, and one for what they leave out, which is not trained."""
    for key in SPAN_KEYS:
        spans = turn.get(key)
        if not spans:
            continue
        covered: set[int] = set()
        for span in spans if isinstance(spans, list) else [spans]:
            try:
                begin, end, is_trained = span["begin_offset"], span["end_offset"], span["train"]
                covered.update(range(max(0, begin), min(end + 1, len(content))))
            except (TypeError, KeyError) as error:
                raise DataError(
                    f"`{key}` has {excerpt(span)}, expected an object with begin_offset, end_offset and train"
                ) from error
            yield from ((key, weight) for _, weight in _flags({"train": is_trained}))
        if not covered.issuperset(range(len(content))):
            yield key, 0


def _names(flags: list[tuple[str, int]]) -> str:
    return " and ".join(dict.fromkeys(f"`{name}`" for name, _ in flags))
