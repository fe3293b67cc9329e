"""Counts what a token shard or a split holds, and how its rows were used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any


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

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(Counts)))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Counts:
        """Returns the counts among the values of a JSON object; what earlier versions did not count is 0.

        Raises:
            KeyError: Another count is missing.
        """
        later = ("num_samples", "num_unended")
        names = [field.name for field in fields(cls) if field.name in data or field.name not in later]
        return cls(**{name: data[name] for name in names})


def total(counts: Iterable[Counts]) -> Counts:
    """Returns the sum of some counts."""
    return sum(counts, Counts())
