"""The coordinator: the one place that commits checkpoints and writes a run's records. Torch-free, Ray-free.

`actor.py` puts it into a Ray actor, tests call it directly. All its state can be rebuilt from the run directory.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dist_ft.checkpoint.lineage import Attempt, take_attempt
from dist_ft.checkpoint.manifest import Manifest
from dist_ft.checkpoint.store import LocalStore
from dist_ft.config import Config
from dist_ft.coordinator.books import Books
from dist_ft.coordinator.checkpoints import clean_up, newest_whole, still_stands
from dist_ft.coordinator.commit import Staging, commit
from dist_ft.coordinator.group import GroupState
from dist_ft.coordinator.policies import can_go_on
from dist_ft.coordinator.restarts import Decision, Failure, Recovery, find_cause
from dist_ft.coordinator.state import FINAL, RunRecord
from dist_ft.coordinator.watchdog import find_stalled, step_limit
from dist_ft.errors import (
    CheckpointError,
    DistFtError,
    StaleAttemptError,
    StalledError,
    WorkerCrashError,
    from_dict,
    from_exception,
)
from dist_ft.messages import (
    AttemptSpec,
    Envelope,
    EvalDone,
    Loaded,
    Message,
    PhaseChanged,
    RankDone,
    RankFailed,
    RankStarted,
    RendezvousOpen,
    Reply,
    Staged,
    StepDone,
)
from dist_ft.monitor.sinks import Sink
from dist_ft.rundir import RunDir


@dataclass(frozen=True)
class Prepared:
    """What preparation found out; the coordinator passes it on to the ranks.

    Attributes:
        splits: Training sources, as dicts of `PreparedSplit`.
        eval_split: Held-out split, or None.
        fingerprint: As a dict of `Fingerprint`.
        max_steps: Steps of the run.
        num_positions: Sequences that the run uses.
    """

    splits: list[dict[str, Any]]
    eval_split: dict[str, Any] | None
    fingerprint: dict[str, Any]
    max_steps: int
    num_positions: int


class Coordinator:
    """Keeps the books of one run.

    Args:
        config: The run config.
        run_dir: The run directory, which exists.
        record: What run.json starts with.
        prepared: What preparation found out.
        sinks: Where rows go besides the JSONL files.
        on_gpu: Whether ranks use CUDA devices.
    """

    def __init__(
        self,
        config: Config,
        run_dir: RunDir,
        record: RunRecord,
        prepared: Prepared,
        sinks: Sequence[Sink] = (),
        on_gpu: bool = False,
    ) -> None:
        self._config = config
        self._run_dir = run_dir
        self._books = Books(run_dir, record, sinks)
        self._record = self._books.record
        self._on_gpu = on_gpu
        self._store = LocalStore(run_dir.path)
        self._prepared = prepared
        self._stop = False
        self._group = GroupState.start(0, 0.0)
        self.recovery = Recovery(config.failure)

    def open_attempt(self, world_size: int) -> AttemptSpec:
        """Takes the next attempt number and names the checkpoint that it starts from.

        Raises:
            UsageError: Another driver took the number.
            StaleAttemptError: Another driver has taken over the run since.
            CheckpointError: There are checkpoints, and all of them are damaged.
        """
        prepared = self._prepared
        self._books.check_mine()  # a driver that was overtaken does not fight back
        start, attempt = self._take_attempt()
        self.recovery.decision = None
        self._group = GroupState.start(world_size, time.monotonic())
        self._books.begin_attempt(attempt, world_size)
        return AttemptSpec(
            run_id=self._record.run_id,
            attempt=attempt.number,
            run_dir=str(self._run_dir.path),
            config=self._config.model_dump(mode="json"),
            splits=prepared.splits,
            eval_split=prepared.eval_split,
            fingerprint=prepared.fingerprint,
            max_steps=prepared.max_steps,
            num_positions=prepared.num_positions,
            start_checkpoint=f"{start.directory}/manifest.json" if start else None,
            on_gpu=self._on_gpu,
            wandb_id=self._record.wandb_id,
        )

    def handle(self, envelope: Envelope) -> Reply:
        """Takes a message from a rank of the current attempt.

        Raises:
            StaleAttemptError: The sender belongs to another run or attempt.
        """
        if (envelope.run_id, envelope.attempt) != (self._record.run_id, self._record.attempt):
            raise StaleAttemptError(
                f"rank {envelope.rank} of run {envelope.run_id}, attempt {envelope.attempt}: the current attempt "
                f"of {self._record.run_id} is {self._record.attempt}"
            )
        handler = self._HANDLERS.get(type(envelope.message))
        if handler is not None:
            handler(self, envelope.rank, envelope.message)
        return Reply(self._stop, self._group.abort, self._group.committed_step, self._group.rendezvous)

    def record_failure(self, error: DistFtError) -> None:
        """Notes an error of the coordinator itself, after which the next decision is made anew."""
        self.recovery.decision = None
        self._group.failures.clear()
        self._fail(0, error.to_dict())

    def request_stop(self, reason: str) -> None:
        """Asks all ranks to checkpoint and stop after their current step."""
        if self._stop or self._record.state in FINAL:
            return
        self._stop = True
        self._record.move("stopping")
        self._books.note("stop_requested", reason=reason)
        self._books.write_record()

    def tick(self, now: float) -> None:
        """Looks at what nobody reports: the stop request file, ranks without progress.

        Args:
            now: Monotonic time in seconds.
        """
        with contextlib.suppress(StaleAttemptError):  # noted as a failure of the group
            self._check_newest()
        if self._run_dir.stop_request.exists():
            self.request_stop("dist-ft stop")
        waiting = [view for rank, view in self._group.ranks.items() if rank not in self._group.done]
        limit_s = step_limit(self._group.step_s, self._config.failure.step_limit_s)
        stalled = find_stalled(waiting, now, limit_s)
        if stalled is not None and self._group.abort is None and not self._group.failures:
            message = f"rank {stalled.rank} makes no progress in phase {stalled.phase} after step {stalled.step}"
            self._group.abort = message
            self._fail(stalled.rank, StalledError(message).to_dict())

    def status(self, num_known: int = 0) -> dict[str, Any]:
        """Returns run.json's contents, the newest rows, and the ledger of this process after `num_known` entries."""
        return {
            **asdict(self._record),
            "row": self._books.last_row,
            "eval": self._books.last_eval,
            "phases": sorted({view.phase for view in self._group.ranks.values()}),
            "ledger": self._books.entries[num_known:],
            "outcome": self.outcome(),
            "failures": self._group.failures,
            "decision": asdict(self.recovery.decision) if self.recovery.decision else None,
        }

    def outcome(self) -> str | None:
        """Returns how the group ended: completed, stopped, failed; None while it works."""
        return self._group.outcome()

    def decide(self, message: str, now: float) -> Decision:
        """Decides what follows the failure of the group; asked again, says the same.

        Args:
            message: What Ray Train says, for a worker that was lost without a word.
            now: Monotonic time in seconds.
        """
        if self.recovery.decision is not None:
            return self.recovery.decision
        with contextlib.suppress(StaleAttemptError):  # noted as a failure of the group
            self._check_newest()
        if not self._group.failures:
            self._fail(0, WorkerCrashError(f"a worker was lost: {message}").to_dict(), is_death=True)
        cause = from_dict(find_cause(self._group.failures))
        decision = self.recovery.decide(Failure(self._record.step, cause), self._stop, now)
        if decision.is_restart:
            self._record.move("recovering")
        event = "recovering" if decision.is_restart else "giving_up"
        facts = {"step": self._record.step, "wait_s": decision.wait_s, "reason": decision.reason}
        self._books.note(event, **facts, cause=cause.to_dict())
        self._books.write_record()
        return decision

    def add_event(self, event: str, **facts: Any) -> None:
        """Writes a ledger entry for a fact that the driver found."""
        self._books.note(event, **facts)

    def record_evaluation(self, row: dict[str, Any]) -> None:
        """Writes an evaluation that a task made."""
        self._books.log_eval(row)

    def finish(self, state: str, result: dict[str, Any], error: dict[str, str] | None = None) -> None:
        """Ends the run's books; the last call. Does nothing when another driver has taken over the run."""
        self._books.finish(state, result, error)

    def _take_attempt(self) -> tuple[Manifest | None, Attempt]:
        """Takes the next attempt number, starting from the newest whole checkpoint.

        Until the number is taken an older driver may still commit, and delete what it then holds for surplus.
        So the choice is looked at again afterwards, and made anew when it no longer stands.
        """
        before: int | None = None
        own = self._books.attempt
        while True:
            start = newest_whole(self._store, self._books, self._can_start, before)
            attempt = take_attempt(self._store, start, own or None)
            own = attempt.number
            before = before or attempt.number
            if still_stands(self._store, start, before):
                return start, attempt

    def _can_start(self, manifest: Manifest) -> bool:
        prepared = self._prepared
        return can_go_on(manifest, self._config.train.global_batch_size, prepared.max_steps, prepared.num_positions)

    def _check_newest(self) -> None:
        """Gives up the books when a newer attempt exists: another driver has taken over the run.

        Raises:
            StaleAttemptError: It does.
        """
        try:
            self._books.check_mine()
        except StaleAttemptError as error:
            if not any(failure["type"] == "StaleAttemptError" for failure in self._group.failures):
                self._group.abort = str(error)
                self._group.failures.append({"rank": 0, "is_death": True, **error.to_dict()})
            raise

    def _on_started(self, rank: int, message: RankStarted) -> None:
        self._group.seen(rank, "load", None, time.monotonic())
        others = [worker for worker in self._record.workers if worker["rank"] != rank]
        worker = {"rank": rank, "pid": message.pid, "node_ip": message.node_ip}
        self._record.workers = sorted([*others, worker], key=lambda w: int(w["rank"]))
        if len(self._record.workers) < self._group.world_size:
            self._books.write_record_now_and_then()
            return
        if not self._stop:
            self._record.move("running")
        self._books.write_record()

    def _on_rendezvous(self, rank: int, message: RendezvousOpen) -> None:
        self._group.rendezvous = (message.host, message.port)

    def _on_phase(self, rank: int, message: PhaseChanged) -> None:
        self._group.seen(rank, message.phase, message.step, time.monotonic())

    def _on_loaded(self, rank: int, message: Loaded) -> None:
        self._group.loaded[rank] = message.num_bytes
        self._group.notes += message.notes
        if len(self._group.loaded) == self._group.world_size:
            num_bytes = sum(self._group.loaded.values())
            self._books.note("loaded", step=message.step, num_bytes=num_bytes, notes=self._group.notes)

    def _on_step(self, rank: int, message: StepDone) -> None:
        row = message.row
        self._check_newest()
        # The all-reduce at the end of a step proves that every rank got there.
        for every in range(self._group.world_size):
            self._group.seen(every, None, row["step"], time.monotonic())
        if row["step"] <= self._group.last_step:
            return
        self._group.last_step = row["step"]
        self._group.step_s.append(row["step_s"])
        self._books.log_step(row)

    def _on_eval(self, rank: int, message: EvalDone) -> None:
        self.record_evaluation(message.row)

    def _on_staged(self, rank: int, message: Staged) -> None:
        staging = self._group.staging.setdefault(message.step, Staging())
        staging.add(rank, message)
        if not staging.is_whole(self._group.world_size):
            return
        del self._group.staging[message.step]
        self._check_newest()
        try:
            manifest = commit(self._store, self._record.run_id, self._record.attempt, self._record.wandb_id, staging)
        except (CheckpointError, OSError) as error:
            self._group.abort = str(error)
            self._fail(rank, from_exception(error))
            return
        self._group.committed_step = manifest.step
        self._books.note("commit", step=manifest.step)
        if self._books.is_mine:
            clean_up(self._store, self._config.checkpoint.keep_last, self._record.attempt)

    def _on_done(self, rank: int, message: RankDone) -> None:
        self._group.done[rank] = message.outcome
        self._record.step = message.step
        self._books.write_record_now_and_then()
        if len(self._group.done) == self._group.world_size:
            self._books.write_record()

    def _on_failed(self, rank: int, message: RankFailed) -> None:
        self._fail(rank, message.error, message.is_death)

    def _fail(self, rank: int, error: dict[str, str], is_death: bool = False) -> None:
        self._group.failures.append({"rank": rank, "is_death": is_death, **error})
        self._books.note("rank_failed", rank=rank, step=self._record.step, **error)

    _HANDLERS: dict[type[Message], Any] = {  # noqa: RUF012
        RankStarted: _on_started,
        RendezvousOpen: _on_rendezvous,
        PhaseChanged: _on_phase,
        Loaded: _on_loaded,
        StepDone: _on_step,
        EvalDone: _on_eval,
        Staged: _on_staged,
        RankDone: _on_done,
        RankFailed: _on_failed,
    }
