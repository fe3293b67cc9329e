"""The driver's hold on the coordinator actor, which Ray starts again when it dies.

A restarted actor knows nothing; it is told of the run again and rebuilds the rest from the run directory. The group
of that moment cannot go on, because what its ranks had staged is forgotten; it is formed anew.
"""

from __future__ import annotations

import logging
import secrets
import time
import uuid
from functools import partial
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dist_ft.coordinator.actor import CoordinatorActor
from dist_ft.errors import CoordinatorLostError
from dist_ft.messages import CoordinatorAddress
from dist_ft.run.events import CoordinatorRestarted

logger = logging.getLogger(__name__)

_RESTARTS = 5
_LIMIT_S = 12 * 3600.0  # a call may wait for a store that does not answer
_AWAY_LIMIT_S = 120.0


class CoordinatorHandle:
    """Calls the coordinator, and tells it of the run again after a restart.

    Args:
        namespace: Ray namespace of its name.

    Attributes:
        where: Its name, and the secret that its calls carry.
        restarts: How often it was told of the run again.
    """

    def __init__(self, namespace: str) -> None:
        # A secret for each run of the driver: on a shared cluster an actor's name is known to everybody.
        self.where = CoordinatorAddress(f"coordinator-{uuid.uuid4().hex[:8]}", namespace, secrets.token_hex(32))
        self.restarts = 0
        self._run: tuple[Any, ...] | None = None
        remote_class: Any = CoordinatorActor
        # On this node: it must not die with a node that only lends workers.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor = remote_class.options(name=self.where.name, scheduling_strategy=here, max_restarts=_RESTARTS).remote(
            self.where.secret
        )
        self._ask = partial(actor.ask.remote, self.where.secret)

    def begin(self, *run: Any) -> None:
        """Opens the run's records; see `CoordinatorCalls.begin`."""
        self._run = run
        self.call("begin", *run)

    def call(self, method: str, *arguments: Any) -> Any:
        """Calls a method and waits for its answer.

        Raises:
            CoordinatorLostError: The actor has died once too often, or does not come back.
        """
        away_since: float | None = None
        while True:
            try:
                return ray.get(self._ask(method, *arguments), timeout=_LIMIT_S)
            except ray.exceptions.ActorUnavailableError as error:
                away_since = away_since or time.monotonic()
                if time.monotonic() - away_since > _AWAY_LIMIT_S:
                    raise CoordinatorLostError(f"the coordinator does not come back: {error}") from error
                time.sleep(0.2)
            except ray.exceptions.RayActorError as error:
                raise CoordinatorLostError(f"the coordinator died: {error}; continue with --resume") from error
            except CoordinatorLostError:
                if self._run is None:
                    raise
                logger.warning("the coordinator was restarted")
                self.restarts += 1
                ray.get(self._ask("begin", *self._run), timeout=_LIMIT_S)
                self._ask("add_event", CoordinatorRestarted(self.restarts))
