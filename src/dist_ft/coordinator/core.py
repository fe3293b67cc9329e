"""Defines the coordinator, the only place that commits checkpoints and writes a run's records. Torch- and Ray-free.

`actor.py` runs it in a Ray actor; tests call it directly. All its state can be rebuilt from the run directory. The
state of one attempt is in `group.py`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from dist_ft.checkpoint.lineage import Attempt, take_attempt
from dist_ft.checkpoint.manifest import Manifest
from dist_ft.config import Config, with_commit
from dist_ft.coordinator.failures import AttemptFailure, Decision, RankFailure, Recovery, explain, find_causes
from dist_ft.coordinator.group import Group
from dist_ft.coordinator.live_status import LiveStatus
from dist_ft.coordinator.recorder import Recorder
from dist_ft.coordinator.sizing import ClusterView, Progress, Sizing, largest_allowed
from dist_ft.coordinator.start import StartSearch, can_go_on, still_stands
from dist_ft.coordinator.watchdog import History
from dist_ft.errors import DistFtError, NodeLostError, StaleAttemptError, WorkerCrashError
from dist_ft.messages import Envelope, Leaving, Reply, StepDone
from dist_ft.metric_rows import EvalRow
from dist_ft.monitor.alerts import AlertReceiver
from dist_ft.monitor.sink import Answers, Sink
from dist_ft.run import events
from dist_ft.run.attempt_spec import AttemptSpec
from dist_ft.run.log import read_steps
from dist_ft.run.place import Run
from dist_ft.run.run_inputs import RunInputs, ShardSize
from dist_ft.run.state import FINAL, RunRecord

logger = logging.getLogger(__name__)

_LOSSES_TO_JUDGE = 50


class Coordinator:
    """Commits the checkpoints of one run and keeps its records.

    Args:
        config: The run config.
        run_dir: The run, whose records have been fetched.
        record: First contents of run.json.
        inputs: What the run trains on.
        sinks: Receive the rows besides the JSONL files.
        alerts: Receive what a person should learn at once.
        on_gpu: Whether ranks use CUDA devices.
        run_search: Runs the search for a start checkpoint; the actor runs it on a thread, to answer calls meanwhile.
    """

    def __init__(
        self,
        config: Config,
        run_dir: Run,
        record: RunRecord,
        inputs: RunInputs,
        sinks: Sequence[Sink] = (),
        alerts: Sequence[AlertReceiver] = (),
        on_gpu: bool = False,
        run_search: Callable[[Callable[[], None]], None] = lambda search: search(),
    ) -> None:
        self._config = with_commit(config, inputs.commit)
        self._run_dir = run_dir
        self._recorder = Recorder(run_dir, record, sinks, alerts)
        self._record = self._recorder.record
        self._on_gpu = on_gpu
        self._store = run_dir.store
        self._inputs = inputs
        self._stop = False
        self._run_search = run_search
        self._search: StartSearch | None = None
        self._own_number = 0  # number of the last attempt taken, opened or not
        self._looked_for_stop: float | None = None
        self._unformed: set[str] = set()  # what was said of groups since the last decision
        self._history = History()
        self._sizing = Sizing(config.cluster)
        self._group = Group(config, run_dir, self._recorder, self._history, world_size=0, now=0.0)
        self.recovery = Recovery(config.failure)

    def open_attempt(self, world_size: int, now: float) -> AttemptSpec | None:
        """Take the next attempt number and choose the checkpoint that the attempt starts from.

        Returns None while the checkpoint is being checked; a later call gets the attempt.

        Args:
            world_size: Number of ranks.
            now: Monotonic time in seconds.

        Raises:
            UsageError: Another driver took the number.
            StaleAttemptError: Another driver has taken over the run meanwhile.
            CheckpointError: Checkpoints exist, but all of them are damaged.
        """
        if self._search is None:
            self._recorder.look_again()
            self._recorder.check_mine()  # a driver that lost the run must not take it back
            self._own_number = self._recorder.attempt
            self._begin_search(before=None)
        taken = self._take_attempt()
        if taken is None:
            return None
        start, attempt = taken
        self.recovery.decision = None
        self._recorder.begin_attempt(attempt, world_size)
        self._group = Group(self._config, self._run_dir, self._recorder, self._history, world_size, now)
        return AttemptSpec(
            run_id=self._record.run_id,
            attempt=attempt.number,
            run_dir=self._run_dir.address,
            config=self._config,
            inputs=self._inputs,
            start_checkpoint=f"{start.directory}/manifest.json" if start else None,
            skipped_steps=tuple(self._recorder.skipped_steps()),
            recent_losses=tuple(self._losses_before(attempt.start_step)),
            evaluations=tuple(self._recorder.evaluations(attempt.start_step)),
            on_gpu=self._on_gpu,
            mtbf_s=self._recorder.mean_time_between_failures_s(now),
        )

    def handle(self, envelope: Envelope, now: float) -> Reply:
        """Process a message from a rank of the current attempt.

        Args:
            envelope: The message and its sender.
            now: Monotonic time in seconds.

        Raises:
            StaleAttemptError: The sender belongs to another run or attempt.
        """
        if (envelope.run_id, envelope.attempt) != (self._record.run_id, self._recorder.attempt):
            raise StaleAttemptError(
                f"rank {envelope.rank} of run {envelope.run_id}, attempt {envelope.attempt}: the current attempt "
                f"of {self._record.run_id} is {self._recorder.attempt}"
            )
        group = self._group
        group.handle(envelope.rank, envelope.message, now)
        if isinstance(envelope.message, StepDone):
            self._sizing.stepped(now)
        if isinstance(envelope.message, Leaving) and not self._stop and group.leaving is None:
            self._drain(f"rank {envelope.rank} was told to end ({envelope.message.reason})", now)
        return Reply(
            stop=self._stop or group.leaving is not None,
            hold=group.leaving is not None and not self._stop and group.done.get(envelope.rank) == "stopped",
            abort=group.abort,
            dump=group.progress.is_asking,
            committed_step=group.saves.committed_step,
            rendezvous=group.rendezvous,
        )

    def record_failure(self, error: DistFtError) -> None:
        """Record an error of the coordinator itself; the next call of `decide` makes a new decision."""
        self.recovery.decision = None
        self._group.failures.clear()
        self._group.fail(RankFailure.of(0, error))

    def add_sizes(self, sizes: Sequence[ShardSize]) -> None:
        """Store the sizes of shards that were made meanwhile, for the ranks of later attempts."""
        self._inputs = self._inputs.with_sizes(sizes)

    def request_stop(self, reason: str) -> None:
        """Ask all ranks to checkpoint and stop after their current step."""
        if self._stop or self._record.state in FINAL:
            return
        self._stop = True
        self._record.move("stopping")
        self._recorder.note(events.StopRequested(reason))
        self._recorder.write_record()

    def tick(self, now: float) -> None:
        """Check what no message reports: the stop request, ranks without progress, a newer attempt.

        Args:
            now: Monotonic time in seconds.
        """
        with contextlib.suppress(StaleAttemptError):  # recorded as a failure of the group
            self._group.check_newest()
        if self._is_asked_to_stop(now):
            self.request_stop("dist-ft stop")
        self._group.check_late(now)

    def _is_asked_to_stop(self, now: float) -> bool:
        looked = self._looked_for_stop
        if self._stop or (looked is not None and now - looked < self._run_dir.look_every_s):
            return False
        self._looked_for_stop = now
        try:
            return self._run_dir.stop_asked_at() is not None
        except OSError as error:  # the store does not answer now; the next tick asks again
            logger.warning("nobody knows whether the run is asked to stop: %s", error)
            return False

    def choose_size(self, view: ClusterView, now: float) -> int | None:
        """Decide whether the group should have another size. Called a few times a second.

        The group first checkpoints and ends, so that no step is lost.

        Args:
            view: The workers and the room in the cluster.
            now: Monotonic time in seconds.

        Returns:
            The size of the new group, once the old one has ended; None while there is nothing to do.
        """
        group = self._group
        if self._stop or not group.world_size or group.failures:
            return None
        if group.formed_at is None:
            group.formed_at = view.formed_at
        if group.is_drained:
            # Workers that were formed later are about to open the next attempt, so do not form them again.
            is_ended = view.formed_at == group.formed_at and self.recovery.decision is None
            return largest_allowed(view.fits, self._config.cluster) if is_ended else None
        if group.leaving is None and group.outcome() is None:
            batch = self._config.train.global_batch_size
            steps_left = self._record.max_steps - self._record.step
            progress = Progress(group.world_size, steps_left, batch, self._sizing.resize_s)
            reason = self._sizing.reason_to_drain(view, progress, self._history, now)
            if reason is not None:
                self._drain(reason, now)
        return None

    def status(self, num_known: int = 0) -> LiveStatus:
        """Return the status of the run, with the ledger entries of this process after the first `num_known`."""
        group, decision = self._group, self.recovery.decision
        has_no_group = not group.world_size or decision is not None or group.is_drained
        return LiveStatus(
            record=replace(self._record),
            row=self._recorder.last_row,
            evaluation=self._recorder.last_eval,
            phases=group.progress.phases,
            ledger=self._recorder.entries[num_known:],
            outcome=self.outcome(),
            failures=tuple(group.failures),
            decision=decision,
            searching=self._search.progress if self._search else None,
            # While its start checkpoint is being checked, a group is not missing; after the check it may be.
            is_waiting=(self._search is None or self._search.is_done or self._stop) and has_no_group,
        )

    def outcome(self) -> str | None:
        """Return how the group ended: completed, stopped, failed; None while it works or a new group follows."""
        return None if self._group.is_drained and not self._stop else self._group.outcome()

    def decide(self, message: str, lost_nodes: Sequence[str], now: float) -> Decision:
        """Decide what follows the failure of the group; the decision stays the same until the next attempt.

        Args:
            message: Ray Train's message, for a worker that was lost without a report.
            lost_nodes: Addresses of machines that held workers of the group and do not answer any more.
            now: Monotonic time in seconds.
        """
        if self.recovery.decision is not None:
            if message not in self._unformed:  # a group that ended before it became an attempt
                self._unformed.add(message)
                self._recorder.note(events.GroupNotStarted(message))
            return self.recovery.decision
        self._unformed = set()
        group = self._group
        with contextlib.suppress(StaleAttemptError):  # recorded as a failure of the group
            group.check_newest()
        if group.is_drained and not self._stop and not group.failures:
            return self.recovery.go_on("the group had checkpointed and ended before it lost a worker")
        if lost_nodes:
            error: DistFtError = NodeLostError(f"{', '.join(lost_nodes)} is gone, with the workers there")
            group.fail(RankFailure.of(0, error, is_death=True))
        elif not group.failures:
            error = WorkerCrashError(f"a worker was lost: {message}")
            group.fail(RankFailure.of(0, error, is_death=True))
        cause = explain(group.failures)
        failure = AttemptFailure(self._record.step, cause, find_causes(group.failures)[0].step)
        decision = self.recovery.decide(failure, self._stop, now)
        if decision.is_restart:
            self._record.move("recovering")
            self._sizing.interrupted(now)
        if decision.skip_step is not None:
            self._recorder.note(events.BatchSkipped(decision.skip_step))
        event = events.Recovering if decision.is_restart else events.GivingUp
        self._recorder.note(event(self._record.step, decision.wait_s, decision.reason, cause.to_dict()))
        self._recorder.write_record()
        return decision

    def add_event(self, event: events.Event) -> None:
        """Write a ledger entry for a fact that the driver found."""
        self._recorder.note(event)

    def record_evaluation(self, row: EvalRow) -> None:
        """Write an evaluation that a task made."""
        self._recorder.log_eval(row)

    def record_answers(self, answers: Answers) -> None:
        """Show sample answers that a task made."""
        self._recorder.log_answers(answers)

    def finish(self, state: str, result: dict[str, Any], error: dict[str, str] | None = None) -> None:
        """Close the run's records, as the last call. Does nothing if another driver has taken over the run."""
        self._recorder.finish(state, result, error)

    def _drain(self, reason: str, now: float) -> None:
        """Make the group checkpoint and end, so that it can be formed again."""
        self._group.leaving = reason
        self._record.move("resizing")
        self._sizing.interrupted(now)
        self._recorder.note(events.Resizing(self._record.step, reason))
        self._recorder.write_record()

    def _losses_before(self, step: int) -> list[float]:
        if self._config.failure.spike_factor is None:
            return []
        rows = read_steps(self._run_dir.metrics)
        losses = (rows[s].loss for s in range(step - _LOSSES_TO_JUDGE + 1, step + 1) if s in rows)
        return [loss for loss in losses if loss is not None]

    def _begin_search(self, before: int | None) -> None:
        self._search = StartSearch(self._store, self._can_start, self._recorder.commits(), before)
        self._run_search(self._search.run)

    def _take_attempt(self) -> tuple[Manifest | None, Attempt] | None:
        """Take the next attempt number, starting from the newest whole checkpoint; None during the search.

        Until the number is taken, an older driver may still commit and delete old checkpoints. The choice is therefore
        checked again afterwards, and repeated if it is no longer valid.
        """
        while self._search is not None and self._search.is_done:
            search, self._search = self._search, None
            start = search.result(self._recorder)
            attempt = take_attempt(self._store, start, self._own_number or None)
            self._own_number = attempt.number
            before = search.before or attempt.number
            if still_stands(self._store, start, before):
                return start, attempt
            self._begin_search(before)
        return None

    def _can_start(self, manifest: Manifest) -> bool:
        inputs = self._inputs
        return can_go_on(manifest, self._config.train.global_batch_size, inputs.max_steps, inputs.num_positions)
