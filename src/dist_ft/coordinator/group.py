"""The ranks of one attempt: takes their messages, commits what they save, sees who is late."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence

from dist_ft.config import Config
from dist_ft.coordinator.commit import Staging, commit
from dist_ft.coordinator.failures import RankFailure
from dist_ft.coordinator.recorder import Recorder
from dist_ft.coordinator.start import clean_up
from dist_ft.coordinator.watchdog import (
    ANSWER_LIMIT_S,
    STEPS_TO_COMPARE,
    History,
    RankView,
    find_culprits,
    find_stalled,
    find_straggler,
    phase_limit,
)
from dist_ft.errors import CheckpointError, DistFtError, StaleAttemptError, StalledError, StorageError, from_exception
from dist_ft.layout import stacks_name
from dist_ft.messages import (
    EvalDone,
    Loaded,
    Located,
    Message,
    Phase,
    PhaseChanged,
    RankDone,
    RankFailed,
    RankStarted,
    RendezvousOpen,
    SaveFailed,
    SaveSkipped,
    Staged,
    StepDone,
    Whereabouts,
)
from dist_ft.run import events
from dist_ft.run.place import Run
from dist_ft.run.scores import Scores

logger = logging.getLogger(__name__)

_LOOKS_APART_S = 5.0
"""From which on this process itself was held up, and nobody's silence can be judged."""
_FAILED_SAVES = 3
"""Saves in a row that may fail before the run ends: a longer run without any would lose too much."""


class Group:
    """What is known of the ranks of the current attempt.

    Args:
        config: The run config.
        run_dir: The run directory.
        recorder: The records of the run, opened for this attempt.
        history: How long things take, noted here and judged by.
        world_size: Number of ranks; 0 before the first attempt.
        now: Monotonic time in seconds.

    Attributes:
        world_size: Number of ranks.
        formed_at: `ClusterView.formed_at` of its workers, once known.
        leaving: Why the group checkpoints and ends, to be formed anew; None while it is to go on.
        abort: Why all ranks are to be ended at once, or None.
        rendezvous: Where rank 0 listens, once known.
        committed_step: Newest checkpoint of this attempt.
        last_step: Newest row of this attempt.
        failures: Those of its ranks, in the order in which they became known.
        done: Outcome of each rank that has ended as it should.
    """

    def __init__(
        self, config: Config, run_dir: Run, recorder: Recorder, history: History, world_size: int, now: float
    ) -> None:
        self.world_size = world_size
        self.formed_at: float | None = None
        self.leaving: str | None = None
        self.abort: str | None = None
        self.rendezvous: tuple[str, int] | None = None
        self.committed_step = 0
        self.last_step = 0
        self.failures: list[RankFailure] = []
        self.done: dict[int, str] = {}
        self._config = config
        self._run_dir = run_dir
        self._store = run_dir.store
        self._recorder = recorder
        self._history = history
        self._ranks = {rank: RankView(rank, Phase.START, 0, now) for rank in range(world_size)}
        self._entered = dict.fromkeys(self._ranks, now)  # when each rank entered its phase
        self._heard: dict[int, float] = {}  # when each rank's supervisor last said anything
        self._looked_at = now
        self._asked_at: float | None = None  # when supervisors were asked where their ranks are
        self._states: dict[int, Whereabouts] = {}  # what they have said
        self._staging: dict[int, Staging] = {}
        self._unsaved: list[int] = []  # steps of the last saves in a row that failed
        self._loaded: dict[int, int] = {}
        self._notes: list[str] = []
        self._local_s: deque[list[float]] = deque(maxlen=STEPS_TO_COMPARE)
        self._stragglers: set[int] = set()

    @property
    def phases(self) -> list[Phase]:
        """What the ranks do now, each phase once."""
        return sorted({view.phase for view in self._ranks.values()})

    @property
    def is_asking(self) -> bool:
        """Whether supervisors are to write down where their ranks are, and to say it."""
        return self._asked_at is not None

    @property
    def is_drained(self) -> bool:
        """Whether every rank has ended behind a checkpoint, for the group to be formed anew."""
        return self.leaving is not None and self.outcome() == "stopped"

    def outcome(self) -> str | None:
        """Returns how the group ended: completed, stopped, failed; None while it works."""
        if self.failures:
            return "failed"
        if self.world_size and len(self.done) == self.world_size:
            return next(iter(self.done.values()))
        return None

    def handle(self, rank: int, message: Message, now: float) -> None:
        """Takes a message of a rank.

        Raises:
            StaleAttemptError: Another driver has taken over the run.
        """
        self._heard[rank] = now
        match message:
            case RankStarted():
                self._on_started(rank, message, now)
            case RendezvousOpen():
                self.rendezvous = (message.host, message.port)
            case PhaseChanged():
                self._seen(rank, message.phase, message.step, now)
            case Loaded():
                self._on_loaded(rank, message)
            case StepDone():
                self._on_step(message, now)
            case EvalDone():
                self._recorder.log_eval(message.row)
            case Staged():
                self._on_staged(rank, message)
            case SaveFailed():
                self._on_save_failed(message.step, f"rank {rank}: {message.reason}", message.is_last)
            case Located():
                self._states[rank] = message.state
            case SaveSkipped():
                self._recorder.note(events.SaveSkipped(message.step))
            case RankDone():
                self._on_done(rank, message)
            case RankFailed():
                self.fail(rank, message.error, message.is_death, message.step)

    def check_late(self, now: float) -> None:
        """Ends the group when a rank makes no progress."""
        if self.abort is not None or self.failures:
            return
        if now - self._looked_at > _LOOKS_APART_S:
            self._heard = dict.fromkeys(self._heard, now)
        self._looked_at = now
        working = [view for rank, view in self._ranks.items() if rank not in self.done]
        limits = self._config.failure.limits
        late = find_stalled(working, now, lambda phase: phase_limit(phase, self.world_size, limits, self._history))
        if not late:
            self._asked_at, self._states = None, {}
        elif self._asked_at is None:
            self._asked_at = now
        elif all(view.rank in self._states for view in late) or now - self._asked_at > ANSWER_LIMIT_S:
            self._end_late(late, now)
            return
        silent = [view.rank for view in working if now - self._heard.get(view.rank, now) > limits.silence_s]
        if silent:
            self.abort = f"nothing was heard of the workers of ranks {silent} for {limits.silence_s:.0f} s"
            self.fail(silent[0], StalledError(self.abort).to_dict())

    def _end_late(self, late: Sequence[RankView], now: float) -> None:
        culprits = find_culprits([view.rank for view in late], self._states)
        first = next(view for view in late if view.rank == culprits[0])
        directory = self._run_dir.address_of(f"logs/attempt-{self._recorder.attempt:04d}/stacks")
        if len(culprits) == 1:
            who, where = f"rank {first.rank} makes", f"where it is: {directory}/{stacks_name(first.rank)}"
        else:
            who, where = f"ranks {', '.join(map(str, sorted(culprits)))} make", f"where they are: {directory}"
        state = self._states.get(first.rank)
        how = " (stopped)" if state == "stopped" else " (its worker does not answer)" if state is None else ""
        self.abort = (
            f"{who} no progress in phase {first.phase} after step {first.step}, for {now - first.since:.0f} s{how}; "
            f"{where}"
        )
        for rank in culprits:
            self.fail(rank, StalledError(self.abort).to_dict())

    def check_newest(self) -> None:
        """Gives up the records when a newer attempt exists: another driver has taken over the run.

        Raises:
            StaleAttemptError: It does.
        """
        try:
            self._recorder.check_mine()
        except StaleAttemptError as error:
            if not any(failure.type == "StaleAttemptError" for failure in self.failures):
                self.abort = str(error)
                self.failures.append(RankFailure(0, type(error).__name__, str(error), is_death=True))
            raise

    def fail(self, rank: int, error: dict[str, str], is_death: bool = False, step: int | None = None) -> None:
        """Notes a failure; `step` is the one whose numbers were bad."""
        self.failures.append(RankFailure(rank, error["type"], error["message"], is_death, step))
        self._recorder.note(events.RankLost(rank, self._recorder.record.step, **error))

    def _seen(self, rank: int, phase: Phase, step: int, now: float) -> None:
        old = self._ranks[rank]
        if phase != old.phase:
            self._history.add_phase(old.phase, now - self._entered[rank])
            self._entered[rank] = now
        self._ranks[rank] = RankView(rank, phase, step, now)

    def _on_started(self, rank: int, message: RankStarted, now: float) -> None:
        self._seen(rank, Phase.LOAD, self._ranks[rank].step, now)
        record = self._recorder.record
        others = [worker for worker in record.workers if worker["rank"] != rank]
        worker = {"rank": rank, "pid": message.pid, "node_ip": message.node_ip}
        record.workers = sorted([*others, worker], key=lambda w: int(w["rank"]))
        if len(record.workers) < self.world_size:
            self._recorder.write_record_now_and_then()
            return
        if record.state != "stopping" and self.leaving is None:
            record.move("running")
        self._recorder.write_record()

    def _on_loaded(self, rank: int, message: Loaded) -> None:
        self._loaded[rank] = message.num_bytes
        self._notes += message.notes
        if len(self._loaded) == self.world_size:
            num_bytes = sum(self._loaded.values())
            self._recorder.note(events.GroupLoaded(message.step, num_bytes, self._notes))

    def _on_step(self, message: StepDone, now: float) -> None:
        row = message.row
        self.check_newest()
        # The all-reduce at the end of a step proves that every rank got there.
        for rank, view in self._ranks.items():
            self._ranks[rank] = RankView(rank, view.phase, max(view.step, row.step), now)
        if row.step <= self.last_step:
            return
        self.last_step = row.step
        self._history.add_step(self.world_size, row.step_s)
        if message.local_s:
            self._local_s.append(message.local_s)
            self._report_straggler()
        self._recorder.log_step(row)

    def _report_straggler(self) -> None:
        found = find_straggler(self._local_s)
        if found is not None and found[0] not in self._stragglers:
            self._stragglers.add(found[0])
            worker = next((w for w in self._recorder.record.workers if w["rank"] == found[0]), {})
            self._recorder.note(events.StragglerFound(found[0], round(found[1], 1), worker.get("node_ip")))

    def _on_staged(self, rank: int, message: Staged) -> None:
        if message.step in self._unsaved:
            return
        staging = self._staging.setdefault(message.step, Staging())
        staging.add(rank, message)
        if not staging.is_whole(self.world_size):
            return
        del self._staging[message.step]
        self.check_newest()
        record = self._recorder.record
        try:
            self._recorder.look_again()
            self.check_newest()
            self._recorder.send()
            manifest = commit(self._store, record.run_id, record.attempt, record.wandb_id, staging)
        except CheckpointError as error:
            self.abort = str(error)
            self.fail(rank, from_exception(error))
            return
        except OSError as error:
            self._on_save_failed(message.step, str(error), message.is_last)
            return
        self.committed_step = manifest.step
        self._unsaved.clear()
        self._recorder.note(events.Committed(manifest.step))
        self._clean_up()

    def _clean_up(self) -> None:
        try:
            self._recorder.look_again()
        except OSError as error:
            logger.warning("old checkpoints stay for now: %s", error)
            return
        if self._recorder.is_mine:
            keep_last, attempt = self._config.checkpoint.keep_last, self._recorder.record.attempt
            clean_up(self._store, keep_last, attempt, self._scores())

    def _scores(self) -> Scores | None:
        """By what the best checkpoint is kept; None when none is."""
        wanted, record = self._config.eval, self._recorder.record
        if wanted.best_metric is None or wanted.every_steps is None:
            return None
        rows = self._recorder.evaluations(record.max_steps)
        return Scores.of(rows, wanted.best_metric, wanted.every_steps, record.max_steps)

    def _on_save_failed(self, step: int, reason: str, is_last: bool) -> None:
        if step in self._unsaved:
            return
        self._unsaved.append(step)
        self._staging.pop(step, None)
        self._recorder.note(events.SaveFailed(step, reason))
        if is_last or len(self._unsaved) >= _FAILED_SAVES:
            error: DistFtError = StorageError(
                f"the checkpoint of step {step} cannot be written ({reason}); make room or mend the storage, then "
                "--resume goes on after the last one"
            )
            self.abort = str(error)
            self.fail(0, error.to_dict())

    def _on_done(self, rank: int, message: RankDone) -> None:
        self.done[rank] = message.outcome
        self._recorder.record.step = message.step
        self._recorder.write_record_now_and_then()
        if len(self.done) < self.world_size:
            return
        if message.outcome == "completed":
            self._note_early_stop(message.step)
        self._recorder.write_record()

    def _note_early_stop(self, step: int) -> None:
        stopping, every = self._config.eval.early_stopping, self._config.eval.every_steps
        max_steps = self._recorder.record.max_steps
        if stopping is None or every is None or step >= max_steps:
            return
        scores = Scores.of(self._recorder.evaluations(step), stopping.metric, every, max_steps)
        self._recorder.note(events.EarlyStop(step, scores.best(), stopping.metric, stopping.patience))
