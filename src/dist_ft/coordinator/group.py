"""Keeps the state of one attempt: processes the messages of its ranks and tells how the attempt ended."""

from __future__ import annotations

from collections import deque

from dist_ft.config import Config
from dist_ft.coordinator.commit import Saves
from dist_ft.coordinator.failures import RankFailure
from dist_ft.coordinator.recorder import Recorder
from dist_ft.coordinator.watchdog import STEPS_TO_COMPARE, History, RankProgress, find_straggler
from dist_ft.errors import StaleAttemptError
from dist_ft.messages import (
    EvalDone,
    IntervalMeasured,
    Loaded,
    Located,
    Message,
    NodeSampled,
    Phase,
    PhaseChanged,
    RankDone,
    RankFailed,
    RankStarted,
    RendezvousOpen,
    SaveFailed,
    SaveSkipped,
    SaveStreamed,
    Staged,
    StepDone,
)
from dist_ft.run import events
from dist_ft.run.place import Run
from dist_ft.run.scores import Scores
from dist_ft.run.state import Worker


class Group:
    """Holds the state of the ranks of the current attempt.

    Args:
        config: The run config.
        run_dir: The run directory.
        recorder: The records of the run, opened for this attempt.
        history: Durations of steps and phases, which the group records and judges ranks by.
        world_size: Number of ranks; 0 before the first attempt.
        now: Monotonic time in seconds.

    Attributes:
        world_size: Number of ranks.
        formed_at: `ClusterView.formed_at` of its workers, once known.
        leaving: Why the group must checkpoint and end, so that a new one is formed; None while it continues.
        abort: Why all ranks must end at once, or None.
        rendezvous: Address at which rank 0 listens, once known.
        last_step: Newest row of this attempt.
        failures: Failures of its ranks, in order of arrival.
        done: Outcome of each rank that has ended without a failure.
        progress: Phases and steps of its ranks, and which of them are late.
        saves: Saves of the attempt.
    """

    def __init__(
        self, config: Config, run_dir: Run, recorder: Recorder, history: History, world_size: int, now: float
    ) -> None:
        self.world_size = world_size
        self.formed_at: float | None = None
        self.leaving: str | None = None
        self.abort: str | None = None
        self.rendezvous: tuple[str, int] | None = None
        self.last_step = 0
        self.failures: list[RankFailure] = []
        self.done: dict[int, str] = {}
        self._config = config
        self._recorder = recorder
        self._history = history
        stacks_dir = run_dir.address_of(f"logs/attempt-{recorder.attempt:04d}/stacks")
        self.progress = RankProgress(world_size, config.failure.limits, history, stacks_dir, now)
        self.saves = Saves(config, run_dir.store, recorder, world_size, self.check_newest)
        self._loaded: dict[int, int] = {}
        self._notes: list[str] = []
        self._local_s: deque[list[float]] = deque(maxlen=STEPS_TO_COMPARE)
        self._stragglers: set[int] = set()
        self._has_streamed = False

    @property
    def is_drained(self) -> bool:
        """Whether every rank has saved a checkpoint and ended, so that a new group can be formed."""
        return self.leaving is not None and self.outcome() == "stopped"

    def outcome(self) -> str | None:
        """Return how the group ended: completed, stopped, failed; None while it works."""
        if self.failures:
            return "failed"
        if self.world_size and len(self.done) == self.world_size:
            return next(iter(self.done.values()))
        return None

    def handle(self, rank: int, message: Message, now: float) -> None:
        """Process a message of a rank.

        Raises:
            StaleAttemptError: Another driver has taken over the run.
        """
        self.progress.hear(rank, now)
        match message:
            case RankStarted():
                self._on_started(rank, message, now)
            case RendezvousOpen():
                self.rendezvous = (message.host, message.port)
            case PhaseChanged():
                self.progress.enter(rank, message.phase, now, message.step)
            case Loaded():
                self._on_loaded(rank, message)
            case StepDone():
                self._on_step(message, now)
            case EvalDone():
                self._recorder.log_eval(message.row)
            case Staged():
                if rank == 0:
                    self._recorder.log_save(message.blocked_s, message.written_s)
                self._end(self.saves.stage(rank, message))
            case SaveFailed():
                self._end(self.saves.fail(message.step, f"rank {rank}: {message.reason}", message.is_last))
            case Located():
                self.progress.locate(rank, message.state)
            case SaveSkipped():
                self._recorder.note(events.SaveSkipped(message.step))
            case NodeSampled():
                self._recorder.log_node(message.node, message.numbers)
            case SaveStreamed():
                self._on_streamed(rank, message)
            case IntervalMeasured():
                self._recorder.note(events.IntervalChosen(**vars(message)))
            case RankDone():
                self._on_done(rank, message)
            case RankFailed():
                self.fail(RankFailure(rank, **message.error, is_death=message.is_death, step=message.step))

    def check_late(self, now: float) -> None:
        """End the group when a rank makes no progress."""
        if self.abort is None and not self.failures:
            for failure in self.progress.find_late(self.done, now):
                self._end(failure)

    def check_newest(self) -> None:
        """Stop writing records when a newer attempt exists: another driver has taken over the run.

        Raises:
            StaleAttemptError: A newer attempt exists.
        """
        try:
            self._recorder.check_mine()
        except StaleAttemptError as error:
            if not any(failure.type == "StaleAttemptError" for failure in self.failures):
                self.abort = str(error)
                self.failures.append(RankFailure.of(0, error, is_death=True))
            raise

    def fail(self, failure: RankFailure) -> None:
        """Record a failure."""
        self.failures.append(failure)
        step = self._recorder.record.step
        self._recorder.note(events.RankLost(failure.rank, step, failure.type, failure.message))

    def _end(self, failure: RankFailure | None) -> None:
        """Record a failure, if there is one, and end all ranks."""
        if failure is not None:
            self.abort = failure.message
            self.fail(failure)

    def _on_started(self, rank: int, message: RankStarted, now: float) -> None:
        self.progress.enter(rank, Phase.LOAD, now)
        record = self._recorder.record
        others = [worker for worker in record.workers if worker.rank != rank]
        worker = Worker(rank, message.pid, message.node_ip)
        record.workers = sorted([*others, worker], key=lambda w: w.rank)
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
        self.progress.finish_step(row.step, now)
        if row.step <= self.last_step:
            return
        self.last_step = row.step
        self._history.add_step(self.world_size, row.step_s)
        self._recorder.log_step(row)
        if not message.local_s:
            return
        self._local_s.append(message.local_s)
        found = find_straggler(self._local_s)
        if found is not None and found[0] not in self._stragglers:
            self._stragglers.add(found[0])
            node_ip = next((w.node_ip for w in self._recorder.record.workers if w.rank == found[0]), None)
            self._recorder.note(events.StragglerFound(found[0], round(found[1], 1), node_ip))

    def _on_streamed(self, rank: int, message: SaveStreamed) -> None:
        if not self._has_streamed:
            self._has_streamed = True
            self._recorder.note(events.SaveStreamed(message.step, rank, message.needed, message.free))

    def _on_done(self, rank: int, message: RankDone) -> None:
        self.done[rank] = message.outcome
        self._recorder.record.step = message.step
        self._recorder.write_record_now_and_then()
        if len(self.done) < self.world_size:
            return
        stopping, every = self._config.eval.early_stopping, self._config.eval.every_steps
        max_steps = self._recorder.record.max_steps
        is_early = message.outcome == "completed" and message.step < max_steps
        if is_early and stopping is not None and every is not None:
            scores = Scores.of(self._recorder.evaluations(message.step), stopping.metric, every, max_steps)
            best = scores.best()
            self._recorder.note(events.EarlyStop(message.step, best, stopping.metric, stopping.patience))
        self._recorder.write_record()
