"""The splits of a config, prepared as a run does it."""

from __future__ import annotations

from dist_ft.config import Config
from dist_ft.data.shards.split import PreparedSplit
from dist_ft.jobs.prepare import prepare


def prepared_splits(config: Config) -> tuple[list[PreparedSplit], PreparedSplit | None]:
    """Makes what is missing; returns the training splits and the held-out one."""
    inputs = prepare(config).inputs
    return [*inputs.splits], inputs.eval_split
