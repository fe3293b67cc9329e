"""Shows the progress of data preparation in one line. Pure; the caller tells the time."""

from __future__ import annotations

from dataclasses import dataclass

from dist_ft.printable import format_duration
from dist_ft.report.console import bar


@dataclass
class ShardProgress:
    """Counts of a preparation.

    Attributes:
        num_shards: Shards to make.
        num_bytes: Stored bytes of their parts.
        began: Monotonic time at which the first shard was begun.
        doing: `preparing`, or `scoring`.
        shards: Shards made so far.
        bytes: Stored bytes of the shards made so far.
        rows: Rows of the shards made so far.
    """

    num_shards: int
    num_bytes: int
    began: float
    doing: str = "preparing"
    shards: int = 0
    bytes: int = 0
    rows: int = 0

    def add(self, num_bytes: int, num_rows: int) -> None:
        """Count a shard that is made."""
        self.shards += 1
        self.bytes += num_bytes
        self.rows += num_rows

    def line(self, now: float) -> str:
        """Return the line, with rows per second and the remaining time estimated from the bytes so far."""
        elapsed = max(1e-9, now - self.began)
        share = self.bytes / max(1, self.num_bytes)
        eta = format_duration(elapsed * (1 - share) / share) if share else "…"
        return (
            f"  {bar(share)} {self.doing} data: {self.shards}/{self.num_shards} shards  {self.rows:,} rows  "
            f"{self.rows / elapsed:,.0f} rows/s  ETA {eta}"
        )
