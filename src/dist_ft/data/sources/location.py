"""Defines a raw row and its location, which counts lines or rows over the whole file.

The rows before a piece of a file are counted only when a location is shown, once per piece: most rows are never named.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa

from dist_ft.errors import DistFtError

_FORMS: Mapping[str, str] = {"line": "{file}:{number}", "row": "{file}: row {number}", "byte": "{file}: byte {number}"}


class RowsBefore:
    """Lines or rows of a file before a piece of it.

    Args:
        count: Counts them; may read the file.
    """

    def __init__(self, count: Callable[[], int]) -> None:
        self._count = count

    @cached_property
    def number(self) -> int | None:
        """Returns the count; None when the file cannot be read any more."""
        try:
            return self._count()
        except (OSError, DistFtError, pa.ArrowException):
            return None


@dataclass(frozen=True, slots=True)
class RowLocation:
    """The location of a row; `str` gives `file:line`, `file: row N` or, deep in a large file, `file: byte N`.

    Attributes:
        file: The file as it is shown.
        number: Line or row, counted from 1 in the piece; or byte, counted from 0 in the file.
        form: `line`, `row` or `byte`.
        before: Lines or rows before the piece; None at the start of a file.
    """

    file: str
    number: int
    form: str
    before: RowsBefore | None = None

    def __str__(self) -> str:
        before = 0 if self.before is None else self.before.number
        if before is None:
            return f"{self.file}: {self.form} {self.number} of a part"
        return _FORMS[self.form].format(file=self.file, number=before + self.number)


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row that was read but not interpreted yet.

    Attributes:
        location: Where the row is in its file.
        data: The parsed row; the text of a row that cannot be parsed.
        problem: Why the row cannot be used; None for a sound row.
    """

    location: RowLocation
    data: Any
    problem: str | None = None
