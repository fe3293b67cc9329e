"""General English text that needs no download: the help texts of the Python that runs (`pydoc_data`, PSF licence).

Owns the rows of `embedded:python-docs/…`. They differ between versions of Python, and so does the key of their shards.
"""

from __future__ import annotations

from collections.abc import Iterator
from pydoc_data.topics import topics
from typing import Final

_EVAL_EVERY: Final = 10
_MIN_CHARACTERS: Final = 600


def passages(is_eval: bool) -> list[str]:
    """Return passages of whole paragraphs, most of 600 to 1,500 characters.

    Args:
        is_eval: Whether of the held-out topics, every tenth by name, or of the others.
    """
    chosen = [name for index, name in enumerate(sorted(topics)) if (index % _EVAL_EVERY == 0) == is_eval]
    return [passage for name in chosen for passage in _cut(topics[name])]


def _cut(text: str) -> Iterator[str]:
    passage: list[str] = []
    for paragraph in text.strip().split("\n\n"):
        passage.append(paragraph)
        if sum(map(len, passage)) >= _MIN_CHARACTERS:
            yield "\n\n".join(passage)
            passage = []
    if passage:
        yield "\n\n".join(passage)
