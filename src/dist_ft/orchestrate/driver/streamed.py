"""Mode `stream`: shards are made while training goes on, in the order in which it needs them."""

from __future__ import annotations

import time
from collections.abc import Mapping

from dist_ft.config import Config
from dist_ft.data.stream.demand import ShardDemand
from dist_ft.errors import DistFtError
from dist_ft.jobs.spec import Preparation
from dist_ft.orchestrate.driver.shard_jobs import ShardJobs

_SHARE = 0.5
"""Of each node's cores; the workers have the rest."""
_LAST_CHECKPOINT_LIMIT_S = 60.0
"""Ranks that wait for a shard that will never come cannot make a last checkpoint."""


class StreamedData:
    """The shards of a run that are yet to come; nothing in mode `ahead`.

    Args:
        config: The run config.
        prepared: What the preparation found.
        on_gpu: Whether the run uses CUDA devices.
    """

    def __init__(self, config: Config, prepared: Preparation, on_gpu: bool) -> None:
        self._jobs: ShardJobs | None = None
        self._error: DistFtError | None = None
        self._failed_at = 0.0
        streamed = prepared.to_stream
        if streamed is not None:
            demand = ShardDemand.of(prepared.inputs.num_positions, config.data.weights, len(config.data.train))
            for made in streamed.made:
                demand.add(*made.window, made.num_sequences)
            self._jobs = ShardJobs(config, streamed.jobs, _SHARE, on_gpu, demand)

    def look(self, starters: Mapping[str, str]) -> bool:
        """Goes on making shards, without waiting; returns whether the run should now make a last checkpoint and stop,
        because a shard cannot be made."""
        if self._jobs is None or self._error is not None:
            return False
        try:
            self._jobs.look(starters)
        except DistFtError as error:
            self._error, self._failed_at = error, time.monotonic()
        return self._error is not None

    def check_patience(self) -> None:
        """Raises what kept a shard from being made, when the last checkpoint has not come in time.

        Raises:
            DistFtError: As `check`.
        """
        if time.monotonic() - self._failed_at > _LAST_CHECKPOINT_LIMIT_S:
            self.check()

    def check(self) -> None:
        """Raises what kept a shard from being made.

        Raises:
            DistFtError: With the place of the row, or what else it was.
        """
        if self._error is not None:
            raise self._error
