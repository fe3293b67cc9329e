"""One row as a file has it, whatever kind of file that is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dist_ft.data.sources.location import Place


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row before anybody asks what it means.

    Attributes:
        place: Where it stands.
        data: The parsed row; the bare text where it cannot be parsed.
        problem: Why it cannot be used; None for a sound row.
    """

    place: Place
    data: Any
    problem: str | None = None
