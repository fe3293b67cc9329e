"""Defines the driver's handle of the coordinator actor, which Ray restarts when it dies.

A restarted actor knows nothing. The handle tells it of the run again, and it rebuilds the rest from the run directory.
The current group cannot continue, because the actor has forgotten the files that its ranks staged; a new group is
formed.
"""

from __future__ import annotations

import logging
import secrets
import time
import uuid
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import ray

from dist_ft.config import Config
from dist_ft.coordinator.actor import CoordinatorActor
from dist_ft.coordinator.failures import Decision
from dist_ft.coordinator.live_status import LiveStatus
from dist_ft.errors import CoordinatorLostError, DistFtError
from dist_ft.messages import CoordinatorAddress
from dist_ft.metric_rows import EvalRow
from dist_ft.monitor.sink import Answers
from dist_ft.orchestrate.workers.nodes import on_node
from dist_ft.run.events import CoordinatorRestarted, Event
from dist_ft.run.place import Run
from dist_ft.run.run_inputs import RunInputs, ShardSize
from dist_ft.run.state import RunRecord

logger = logging.getLogger(__name__)

_RESTARTS = 5
_LIMIT_S = 12 * 3600.0  # a call may wait for a store that does not answer
_AWAY_LIMIT_S = 120.0


class CoordinatorHandle:
    """Calls the coordinator, and repeats after a restart what the driver has told it.

    Every call waits for the answer. It may raise CoordinatorLostError: the actor has died too often, or does not come
    back.

    Args:
        namespace: Ray namespace of the actor's name.

    Attributes:
        where: Name of the actor, and the secret that its calls carry.
    """

    def __init__(self, namespace: str) -> None:
        # Each run of the driver has a secret, because on a shared cluster everybody can find an actor's name.
        self.where = CoordinatorAddress(f"coordinator-{uuid.uuid4().hex[:8]}", namespace, secrets.token_hex(32))
        self._run: tuple[Any, ...] | None = None
        self._sizes: list[ShardSize] = []
        self._starters: dict[str, str] = {}
        self._has_stopped = False
        self._num_restarts = 0
        self._num_known = 0  # ledger entries of the actor's process
        remote_class: Any = CoordinatorActor
        # The actor is on this node, so that it does not die with a node that only holds workers.
        here = on_node(ray.get_runtime_context().get_node_id())
        options = remote_class.options(name=self.where.name, scheduling_strategy=here, max_restarts=_RESTARTS)
        self._ask = partial(options.remote(self.where.secret).ask.remote, self.where.secret)

    def begin(self, config: Config, run_dir: Run, record: RunRecord, inputs: RunInputs, on_gpu: bool) -> None:
        """Open the records of the run."""
        self._run = (config, run_dir.address, str(run_dir.path), record, inputs, on_gpu)
        self._call("begin", *self._run)

    def set_starters(self, paths: Mapping[str, str]) -> None:
        """Tell the coordinator the sockets of the fork servers, by node id."""
        self._starters = dict(paths)
        self._call("set_starters", self._starters)

    def add_sizes(self, sizes: Sequence[ShardSize]) -> None:
        """Tell the coordinator the sizes of shards that were made; ranks of later attempts need not read them."""
        self._sizes.extend(sizes)
        self._call("add_sizes", sizes)

    def request_stop(self, reason: str) -> None:
        """Ask all ranks to checkpoint and stop after their current step."""
        self._has_stopped = True
        self._call("request_stop", reason)

    def poll(self) -> LiveStatus:
        """Return the status of the run, with only the ledger entries that are new since the last call."""
        while True:
            num_restarts = self._num_restarts
            status: LiveStatus = self._call("poll", self._num_known)
            if self._num_restarts == num_restarts:
                self._num_known += len(status.ledger)
                return status

    def decide(self, message: str) -> bool:
        """Return whether to form a new group after the last one ended with this message."""
        while True:
            decision: Decision | None = self._call("decide", message, [])
            if decision is not None:
                return decision.is_restart
            self._call("poll", 0)  # restarted at this moment: this call has it told of the run again

    def add_event(self, event: Event) -> None:
        """Write a ledger entry."""
        self._call("add_event", event)

    def record_evaluation(self, row: EvalRow) -> None:
        """Write an evaluation that a task made."""
        self._call("record_evaluation", row)

    def record_answers(self, answers: Answers) -> None:
        """Show sample answers in the sinks."""
        self._call("record_answers", answers)

    def finish(self, state: str, result: dict[str, Any], error: dict[str, str] | None) -> None:
        """Close the records of the run. This is the last call."""
        self._call("finish", state, result, error)

    def _call(self, method: str, *arguments: Any) -> Any:
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
                self._num_restarts += 1
                self._num_known = 0  # it has a new ledger
                ray.get(self._ask("begin", *self._run), timeout=_LIMIT_S)
                self._ask("add_event", CoordinatorRestarted(self._num_restarts))
                self._ask("set_starters", self._starters)
                self._ask("add_sizes", self._sizes)
                if self._has_stopped:
                    self._ask("request_stop", "asked before the coordinator was restarted")
            except DistFtError as error:
                # Ray's wrapper is named otherwise, and has a whole traceback for a message.
                raise getattr(error, "cause", None) or error from None
