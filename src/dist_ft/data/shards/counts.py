"""Counts what a token shard or a split holds, and how its rows were used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

MAX_UNREAD = 20
"""Most keys that are named; a file may have a new one in every row."""


@dataclass(frozen=True)
class Counts:
    """Totals of a shard or a split; they add up.

    Attributes:
        num_rows: Rows used, including those without a trained token.
        num_sequences: Sequences after packing.
        num_tokens: Tokens of all sequences.
        num_trained_tokens: Tokens whose prediction is trained.
        num_untrained_rows: Rows left out because no token of theirs would be trained.
        num_long_samples: Samples longer than `data.seq_len`, treated as `data.long_samples` says.
        num_bad_rows: Rows left out because they cannot be used.
        num_samples: Samples of all sequences.
        num_unended: Trained answers that end without a token at which generation stops.
        unread: Keys of rows, and of what is in them, to which nothing gives a meaning; the first by name.
    """

    num_rows: int = 0
    num_sequences: int = 0
    num_tokens: int = 0
    num_trained_tokens: int = 0
    num_untrained_rows: int = 0
    num_long_samples: int = 0
    num_bad_rows: int = 0
    num_samples: int = 0
    num_unended: int = 0
    unread: tuple[str, ...] = ()

    def __add__(self, other: Counts) -> Counts:
        names = (field.name for field in fields(Counts) if field.name != "unread")
        unread = self.unread if other.unread in ((), self.unread) else first_unread(self.unread, other.unread)
        return Counts(**{name: getattr(self, name) + getattr(other, name) for name in names}, unread=unread)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Counts:
        """Return the counts among the values of a JSON object; what earlier versions did not count is 0.

        Raises:
            KeyError: Another count is missing.
        """
        later = ("num_samples", "num_unended", "unread")
        names = [field.name for field in fields(cls) if field.name in data or field.name not in later]
        return cls(**{name: data[name] for name in names} | {"unread": tuple(data.get("unread", ()))})


def total(counts: Iterable[Counts]) -> Counts:
    """Return the sum of some counts."""
    return sum(counts, Counts())


def first_unread(*keys: Iterable[str]) -> tuple[str, ...]:
    """Return the first of some unread keys by name, in any order of parts."""
    return tuple(sorted({key for some in keys for key in some})[:MAX_UNREAD])
