"""A run without ranks: its directory, its coordinator, and a test that says what real ranks would say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dist_ft.checkpoint.snapshot import write_slices
from dist_ft.config import Config
from dist_ft.coordinator.core import Coordinator
from dist_ft.data.shards.counts import Counts
from dist_ft.data.shards.split import PreparedSplit
from dist_ft.layout import slices_name
from dist_ft.messages import (
    Envelope,
    Message,
    RankStarted,
    Reply,
    SaveFailed,
    Staged,
    StepDone,
)
from dist_ft.metric_rows import EvalRow, StepRow
from dist_ft.monitor.sink import Answers
from dist_ft.run.place import Run
from dist_ft.run.run_inputs import RunInputs
from dist_ft.run.state import RunRecord
from dist_ft.slices import STATE_KINDS, ParamInfo, SliceKey
from dist_ft.storage.store import LocalStore
from tests.helpers.manifests import MARK, saved_state
from tests.helpers.rows import read_rows, step_row

RUN_ID = "full"
WORLD_SIZE = 2
PARAMS = (ParamInfo("w", (4, 5), "w"), ParamInfo("b", (3,), "b"))
SPLIT = PreparedSplit("/cache", "train", 1, Counts(), {}, max_tokens=8, max_trained_tokens=7)
INPUTS = RunInputs((SPLIT,), replace(SPLIT, key="eval"), MARK, max_steps=60, num_positions=480)
ENDED = {"type": "WorkerCrashError", "message": "rank 1 died (killed by signal 9)"}


def run_config(
    keep_last: int = 2,
    failure: dict[str, Any] | None = None,
    evaluation: dict[str, Any] | None = None,
    checkpoint: dict[str, Any] | None = None,
) -> Config:
    return Config.model_validate(
        {
            "run": {"name": RUN_ID},
            "model": {"name": "tiny-random", "dtype": "float32"},
            "method": {"kind": "full"},
            "data": {"train": [{"source": "embedded:orders/train"}], "eval": "embedded:orders/eval"},
            "train": {"global_batch_size": 8, "micro_batch_size": 2, "max_steps": 60},
            "cluster": {"num_workers": [1, WORLD_SIZE]},
            "checkpoint": {"every_steps": 10, "keep_last": keep_last, **(checkpoint or {})},
            "failure": failure or {},
            "eval": evaluation or {},
            "monitor": {"wandb": "disabled"},
        }
    )


@dataclass
class RecordingSink:
    """A sink that keeps what it is given."""

    steps: list[int] = field(default_factory=list)
    evals: list[int] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    states: list[str] = field(default_factory=list)

    def log_step(self, row: StepRow) -> None:
        self.steps.append(row.step)

    def log_eval(self, row: EvalRow) -> None:
        self.evals.append(row.step)

    def log_answers(self, answers: Answers) -> None:
        self.answers.append(answers.step)

    def close(self, state: str) -> None:
        self.states.append(state)


@dataclass
class SimulatedRun:
    """A run directory, the coordinator of this driver, and ranks that say what real ones say.

    `now` is the monotonic clock that the coordinator is told; a test moves it.
    """

    dir: Run
    keep_last: int = 2
    failure: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    checkpoint: dict[str, Any] = field(default_factory=dict)
    sink: RecordingSink = field(default_factory=RecordingSink)
    inputs: RunInputs = INPUTS
    now: float = 1000.0
    run_search: Callable[[Callable[[], None]], None] = lambda search: search()

    def __post_init__(self) -> None:
        self.store = LocalStore(self.dir.path)
        self.restart()

    def restart(self) -> None:
        """Another driver's coordinator, which knows the disk only."""
        record = RunRecord(RUN_ID, max_steps=60)
        config = run_config(self.keep_last, self.failure, self.evaluation, self.checkpoint)
        self.coordinator = Coordinator(config, self.dir, record, self.inputs, [self.sink], run_search=self.run_search)

    def open(self, world_size: int = WORLD_SIZE, start: bool = True) -> Any:
        self.world_size = world_size
        self.spec = self.coordinator.open_attempt(world_size, self.now)
        if start:
            for rank in range(world_size):
                self.send(rank, RankStarted(1000 + rank, "10.0.0.1"))
        return self.spec

    def send(self, rank: int, message: Message, attempt: int | None = None, run_id: str = RUN_ID) -> Reply:
        return self.coordinator.handle(Envelope(run_id, attempt or self.spec.attempt, rank, message), self.now)

    def tick(self) -> None:
        self.coordinator.tick(self.now)

    def step(self, step: int, loss: float = 1.0) -> Reply:
        return self.send(0, StepDone(self.row(step, loss), []))

    def row(self, step: int, loss: float = 1.0) -> StepRow:
        return step_row(step, self.spec.attempt, loss=loss)

    def stage(
        self, rank: int, step: int, start: int | None = None, end: int | None = None, is_last: bool = False
    ) -> Reply:
        """Writes a rank's slice file, as `train/loop.py` does, and reports it."""
        slices = []
        for param in PARAMS:
            first = param.numel * rank // self.world_size if start is None else start
            last = param.numel * (rank + 1) // self.world_size if end is None else end
            for kind in STATE_KINDS:
                slices.append((SliceKey(param.name, first, kind), torch.full((last - first,), float(step))))
        directory = self.dir.checkpoint(step, self.spec.attempt)
        file = write_slices(LocalStore(directory), slices_name(rank, self.world_size), slices)
        return self.send(rank, Staged(step, file, saved_state(step, PARAMS) if rank == 0 else None, is_last))

    def commit(self, step: int) -> Reply:
        for rank in range(self.world_size):
            reply = self.stage(rank, step)
        return reply

    @property
    def directories(self) -> list[str]:
        return sorted(path.name for path in self.dir.checkpoints.iterdir())

    def events(self, name: str) -> list[dict[str, Any]]:
        return [entry for entry in read_rows(self.dir.ledger) if entry["event"] == name]

    def damage(self, step: int, attempt: int) -> None:
        path = self.dir.checkpoint(step, attempt) / slices_name(0, WORLD_SIZE)
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)


def full_disk(rank: int, step: int, is_last: bool = False) -> SaveFailed:
    return SaveFailed(step, "OSError: [Errno 28] No space left on device", is_last)
