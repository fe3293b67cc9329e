"""Tells which shards a run in mode `stream` needs: those whose window begins before its last position. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil


@dataclass
class ShardDemand:
    """Counts the sequences of each source, window by window.

    Attributes:
        wanted: Sequences that the run takes of each source.
        sequences: (source, window) → sequences made.
        enough: Source → a window that is not needed. Counts only grow, so later windows are not needed either.
    """

    wanted: Sequence[int]
    sequences: Counter[tuple[int, int]] = field(default_factory=Counter)
    enough: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, num_positions: int, weights: Sequence[float] | None, num_sources: int) -> ShardDemand:
        """Return the demand of a run with this many positions."""
        shares = weights or [1.0] * num_sources
        return cls([ceil(num_positions * share / sum(shares)) + 1 for share in shares])

    def add(self, source: int, window: int, num_sequences: int) -> None:
        """Record a shard that is made."""
        self.sequences[source, window] += num_sequences

    def is_needed(self, source: int, window: int) -> bool:
        """Return whether the run may reach a window; shards that are still being made count as empty."""
        if source in self.enough and window >= self.enough[source]:
            return False  # skip the count below: a hundred thousand shards may be dropped at once
        before = sum(count for (of, at), count in self.sequences.items() if of == source and at < window)
        if before < self.wanted[source]:
            return True
        self.enough[source] = window
        return False
