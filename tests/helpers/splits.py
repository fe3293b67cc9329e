"""The splits of a config, prepared as a run does it."""

from __future__ import annotations

from dist_ft.config import Config
from dist_ft.data.shards.split import PreparedSplit
from dist_ft.jobs.prepare import run


def prepared_splits(config: Config) -> tuple[list[PreparedSplit], PreparedSplit | None]:
    """Makes what is missing; returns the training splits and the held-out one."""
    prepared = run(config.model_dump(mode="json"))
    held_out = prepared["eval_split"]
    return (
        [PreparedSplit.from_dict(split) for split in prepared["splits"]],
        PreparedSplit.from_dict(held_out) if held_out else None,
    )
