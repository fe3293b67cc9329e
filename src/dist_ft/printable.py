"""Makes text of others safe to print, and formats sizes, counts and durations for people.

Escaped text can neither steer a terminal nor fill it. The caller says where it is printed, and how long it may be.
"""

from __future__ import annotations

import reprlib
import unicodedata

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxdict, _SHORT.maxlist, _SHORT.maxstring, _SHORT.maxother = 3, 6, 4, 60, 60
_SHOWN_SPACES = "Zs"  # wide and no-break spaces; Python calls them not printable, a terminal does no harm with them


def printable(text: str, limit: int | None = None) -> str:
    """Return text in which every control, format and half character is an escape such as `\\x1b` or `\\u202e`.

    Line breaks and tabs are escaped, too, so the result is one line.

    Args:
        limit: Characters of `text` to keep; what is left out is counted.
    """
    left_out = 0 if limit is None else max(0, len(text) - limit)
    kept = text[: len(text) - left_out]
    if not kept.isprintable():
        kept = "".join(map(_escape, kept))
    return f"{kept}… ({left_out:,} more characters)" if left_out else kept


def excerpt(value: object) -> str:
    """Return at most 80 characters that show a value from outside, as `repr` writes it, safe for a terminal."""
    text = _SHORT.repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _escape(character: str) -> str:
    if character.isprintable() or unicodedata.category(character) == _SHOWN_SPACES:
        return character
    code = ord(character)
    if character in "\n\r\t":
        return {"\n": "\\n", "\r": "\\r", "\t": "\\t"}[character]
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def format_count(number: int, noun: str) -> str:
    """Return `1 row`, `2,000 rows` and the like."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def format_duration(seconds: float) -> str:
    """Return `45s`, `3m20s` or `2h05m`."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def format_bytes(count: float) -> str:
    """Return `1.5 GiB` and the like."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
