"""Defines the calls that other processes make to the coordinator, and checks their secret. Ray-free.

`actor.py` answers the calls in a Ray actor.
"""

from __future__ import annotations

import hmac
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dist_ft.config import Config
from dist_ft.coordinator.core import Coordinator
from dist_ft.coordinator.failures import Decision
from dist_ft.coordinator.live_status import LiveStatus
from dist_ft.coordinator.sizing import ClusterView
from dist_ft.errors import CoordinatorLostError, DistFtError, NotAllowedError, StaleAttemptError
from dist_ft.messages import Envelope
from dist_ft.metric_rows import EvalRow
from dist_ft.monitor.alerts import WebhookAlerts, build_alerts
from dist_ft.monitor.sink import Answers, History, Sink, SinkRun
from dist_ft.monitor.sinks import build_sinks
from dist_ft.run.attempt_spec import AttemptSpec
from dist_ft.run.events import Event
from dist_ft.run.log import read_evals, read_steps
from dist_ft.run.place import open_run
from dist_ft.run.run_inputs import RunInputs, ShardSize
from dist_ft.run.state import RunRecord


class CoordinatorCalls:
    """Answers the calls that other processes make to the coordinator. Every call carries the secret of the run.

    Calls run one after the other, so the coordinator needs no locks. The actor starts early, in parallel to the
    preparation; `begin` is the first call that touches a file.

    Args:
        secret: The run secret, made by the driver; a caller without it does not belong to the run.
        more_sinks: Makes sinks of a run besides those of its config; the actor's are Ray's metrics.
    """

    def __init__(self, secret: str, more_sinks: Callable[[str], Sequence[Sink]] = lambda run: ()) -> None:
        self._secret = secret
        self._more_sinks = more_sinks
        self._coordinator: Coordinator | None = None
        self._attempt: AttemptSpec | None = None
        self._starters: dict[str, str] = {}
        self._webhook: WebhookAlerts | None = None

    def ask(self, secret: str, call: str, *arguments: Any) -> Any:
        """Make a call of this class.

        Raises:
            NotAllowedError: The secret is not the run's, or no such call exists; nothing has changed.
        """
        if not hmac.compare_digest(secret.encode(), self._secret.encode()):
            raise NotAllowedError("the coordinator takes calls of its own run only: the run secret is missing or wrong")
        if call not in CALLS:
            raise NotAllowedError(f"the coordinator knows no call {call!r}, only {', '.join(sorted(CALLS))}")
        return getattr(self, call)(*arguments)

    def begin(
        self, config: Config, run_dir: str, scratch: str, record: RunRecord, inputs: RunInputs, on_gpu: bool
    ) -> None:
        """Open the run's records; `scratch` is the directory into which the driver has fetched them."""
        place = open_run(run_dir, Path(scratch))

        def read_history() -> History:
            steps, evals = read_steps(place.metrics), read_evals(place.evals)
            return History([steps[step] for step in sorted(steps)], [evals[step] for step in sorted(evals)])

        values = config.model_dump(mode="json")
        sink_run = SinkRun(record.run_id, config.monitor.project, place.path, values, read_history)
        sinks = build_sinks(config.monitor, record.sink_ids, sink_run)
        alerts, self._webhook = build_alerts(config.monitor, sinks)
        sinks += self._more_sinks(record.run_id)
        self._coordinator = Coordinator(config, place, record, inputs, sinks, alerts, on_gpu, _in_thread)

    def open_attempt(self, world_size: int) -> int | None:
        """Open an attempt and return its number; return None while the attempt cannot begin yet.

        It waits for the preparation, the pause before a restart, and the check of its start checkpoint.
        """
        if self._coordinator is None or not self._coordinator.recovery.may_open(time.monotonic()):
            return None
        try:
            spec = self._known.open_attempt(world_size, time.monotonic())
        except DistFtError as error:
            # The driver learns of the error from the status; the worker only has to end.
            self._known.record_failure(error)
            raise
        if spec is None:
            return None
        self._attempt = spec
        return spec.attempt

    def set_starters(self, paths: dict[str, str]) -> None:
        """Store the sockets of the fork servers, by node id."""
        self._starters = paths

    def add_sizes(self, sizes: list[ShardSize]) -> None:
        """See `Coordinator.add_sizes`."""
        self._known.add_sizes(sizes)

    def starter(self, node_id: str) -> str | None:
        """Return the socket of a node's fork server, if it has one."""
        return self._starters.get(node_id)

    def attempt_spec(self, number: int) -> AttemptSpec:
        """Return what all ranks of the current attempt share."""
        if self._attempt is None or self._attempt.attempt != number:
            raise StaleAttemptError(f"attempt {number} is not the current one")
        return self._attempt

    def handle(self, envelope: dict[str, Any]) -> dict[str, Any]:
        """See `Coordinator.handle`."""
        return self._known.handle(Envelope.from_dict(envelope), time.monotonic()).to_dict()

    def request_stop(self, reason: str) -> None:
        """See `Coordinator.request_stop`."""
        self._known.request_stop(reason)

    def choose_size(self, view: ClusterView) -> int | None:
        """See `Coordinator.choose_size`; None before the run has begun."""
        if self._coordinator is None:
            return None
        return self._coordinator.choose_size(view, time.monotonic())

    def poll(self, num_known: int) -> LiveStatus:
        """Tick, then return the status. The driver calls it a few times a second."""
        self._known.tick(time.monotonic())
        return self._known.status(num_known)

    def decide(self, message: str, lost_nodes: list[str]) -> Decision | None:
        """See `Coordinator.decide`; None while a restarted actor does not know the run yet."""
        if self._coordinator is None:
            return None
        return self._known.decide(message, lost_nodes, time.monotonic())

    def add_event(self, event: Event) -> None:
        """See `Coordinator.add_event`."""
        self._known.add_event(event)

    def record_evaluation(self, row: EvalRow) -> None:
        """See `Coordinator.record_evaluation`."""
        self._known.record_evaluation(row)

    def record_answers(self, answers: Answers) -> None:
        """See `Coordinator.record_answers`."""
        self._known.record_answers(answers)

    def finish(self, state: str, result: dict[str, Any], error: dict[str, str] | None = None) -> None:
        """See `Coordinator.finish`."""
        self._known.finish(state, result, error)
        if self._webhook is not None:
            self._webhook.close()

    @property
    def _known(self) -> Coordinator:
        if self._coordinator is None:
            raise CoordinatorLostError("the coordinator knows of no run")
        return self._coordinator


CALLS = frozenset(name for name in vars(CoordinatorCalls) if not name.startswith("_")) - {"ask"}
"""Names of the calls."""


def _in_thread(search: Callable[[], None]) -> None:
    """Run a search on a thread, so that the actor can answer meanwhile. The thread ends with the actor."""
    threading.Thread(target=search, name="start-search", daemon=True).start()
