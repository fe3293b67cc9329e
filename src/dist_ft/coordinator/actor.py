"""Runs the coordinator in Ray: one named actor per run, on the driver's node."""

from __future__ import annotations

import logging
from typing import Any

import ray

from dist_ft.coordinator.calls import CoordinatorCalls
from dist_ft.monitor.ray_metrics import RayMetrics


@ray.remote(num_cpus=0)
class CoordinatorActor:
    """Answers the calls of one run; see `CoordinatorCalls`."""

    def __init__(self, secret: str) -> None:
        logging.basicConfig(level=logging.INFO)
        self._calls = CoordinatorCalls(secret, lambda run: [RayMetrics(run)])

    def ask(self, secret: str, call: str, *arguments: Any) -> Any:
        """See `CoordinatorCalls.ask`."""
        return self._calls.ask(secret, call, *arguments)
