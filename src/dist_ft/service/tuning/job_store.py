"""Jobs as they lie in the store: `jobs/ftjob-…/` with job.json, config.yaml, events and checkpoints, beside its run.

job.json is the truth and the index a copy of it. Events and checkpoints are appended to files and indexed; the id of
each follows from what it tells, so that telling it twice changes nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dist_ft.run.exports import FINAL
from dist_ft.run.log import JsonlWriter, read_lines
from dist_ft.run.place import RECORDS, Run
from dist_ft.run.state import RunRecord
from dist_ft.service.depot import Depot
from dist_ft.service.index import Index, Row
from dist_ft.service.tuning.job_plan import Estimate
from dist_ft.service.tuning.job_request import Hyperparameters, JobRequest
from dist_ft.service.wire import Object, made_id, read_record
from dist_ft.storage.publish import read_json, write_json
from dist_ft.typed_json import from_json

ENDS = ("succeeded", "failed", "cancelled")
ACTIVE = ("validating_files", "queued", "running")
"""States in which the dispatcher has work to do."""
CHECKPOINT_MARK = ":ckpt-step-"
"""Stands between the name of a model and the step of a checkpoint."""
_ROWS = ("events.jsonl", "checkpoints.jsonl")
READY = "ready"
"""Label of a model that is there."""


@dataclass(frozen=True)
class JobError:
    """Why a job failed."""

    code: str
    param: str | None
    message: str


@dataclass(frozen=True)
class JobRecord:
    """A job, as job.json holds it.

    Attributes:
        id: Name of the job, and of its run.
        project: Whose it is.
        created_at: Unix time.
        request: What was asked for.
        base: Name in the catalogue of the model that is trained in the end.
        start_job: Earlier job whose result, or checkpoint at `start_step`, this one starts from.
        start_step: Step of that checkpoint; None: the result.
        settings: Hyperparameters; numbers once the files are known.
        tuned_name: Name that the result will have.
        status: State of the API.
        wanted: `run`, `pause` or `cancel`: what the client asked for last.
        num_examples: Training examples; 0 before validation.
        format: Format of the files; None before validation.
        launched_as: Name of the launcher's job; None while there is none.
        num_starts: How often a run was started.
        num_losses: How often it was lost since the last progress.
        step: Completed steps.
        max_steps: Steps of the run; 0 before it says so.
        estimated_finish: Unix time.
        finished_at: Unix time.
        trained_tokens: Tokens of all steps, of a job that succeeded.
        has_model: Whether the result is there, and was not deleted.
        result_file: The file of metrics.
        best_step: Step of the checkpoint with the least loss on the validation file; None: nothing was measured yet.
        estimate: What it will take; None before validation.
        error: Why it failed.
    """

    id: str
    project: str
    created_at: int
    request: JobRequest
    base: str
    start_job: str | None
    start_step: int | None
    settings: Hyperparameters
    tuned_name: str
    status: str = "validating_files"
    wanted: str = "run"
    num_examples: int = 0
    format: str | None = None
    launched_as: str | None = None
    num_starts: int = 0
    num_losses: int = 0
    step: int = 0
    max_steps: int = 0
    estimated_finish: int | None = None
    finished_at: int | None = None
    trained_tokens: int | None = None
    has_model: bool = False
    result_file: str | None = None
    error: JobError | None = None
    best_step: int | None = None
    estimate: Estimate | None = None

    def checkpoint_name(self, step: int) -> str:
        """Return the name of the model at a checkpoint."""
        return f"{self.tuned_name}{CHECKPOINT_MARK}{step}"

    def ended(self, status: str, error: JobError | None = None) -> JobRecord:
        """Return the record of a job that has come to its end."""
        return replace(self, status=status, error=error, finished_at=int(time.time()), estimated_finish=None)


class JobStore:
    """Reads and writes jobs.

    Args:
        depot: Where they lie.
        index: Where they are listed.
        on_end: Called for each job that comes to its end; again for the same job if this process died then.
    """

    def __init__(self, depot: Depot, index: Index, on_end: Callable[[JobRecord], None]) -> None:
        self.depot = depot
        self._index = index
        self._on_end = on_end
        self._lock = threading.RLock()

    def folder(self, job: str) -> Path:
        """Return the folder of a job; its run lies elsewhere, because a run makes its directory itself."""
        return self.depot.path / "jobs" / job

    def run(self, job: str) -> Run:
        """Return the run of a job, which may not have begun."""
        return self.depot.run(job)

    def fetched(self, job: str) -> RunRecord | None:
        """Fetch the records of a job's run from wherever it is at work; return run.json, None while there is none."""
        run = self.run(job)
        run.fetch(*RECORDS)  # run.json first: what it tells of is then there
        return read_run(run)

    def add(self, record: JobRecord) -> None:
        """Add a new job. It exists once the index has it; its event is there before, so that none is without one."""
        self.tell(record, "created", f"Created fine-tuning job: {record.id}")
        with self._lock:
            self._list(record)
            self._save(record)

    def find(self, job: str, project: str | None = None) -> JobRecord | None:
        """Return a job; None if there is none, or it belongs to another project."""
        row = self._index.get("job", job, project)
        return None if row is None else from_json(JobRecord, row.data)

    def page(self, project: str, after: str | None, limit: int) -> tuple[list[JobRecord], bool]:
        """Return a page of jobs, the newest first, and whether there are more."""
        rows, has_more = self._index.listed("job", project, after, limit)
        return [from_json(JobRecord, row.data) for row in rows], has_more

    def active(self, project: str | None = None) -> list[JobRecord]:
        """Return the jobs that the dispatcher looks after, of one project or of all, the oldest first."""
        return [from_json(JobRecord, row.data) for row in self._index.every("job", ACTIVE, project)]

    def change(self, job: str, change: Callable[[JobRecord], JobRecord]) -> JobRecord:
        """Change a job; nobody else changes it in between, in this process or another one."""
        with self._lock, self._index.holding(job):
            old = self.find(job)
            if old is None:
                raise KeyError(job)
            new = change(old)
            if new.status in ENDS and old.status not in ENDS:
                self._on_end(new)  # first, so that an end is told even if this process dies before it is written
            if new != old:
                self._save(new)
                self._list(new)
            return new

    def tell(
        self,
        record: JobRecord,
        mark: str,
        message: str,
        level: str = "info",
        data: Object | None = None,
        at: float | None = None,
    ) -> None:
        """Add an event to a job, unless one with its mark is there.

        Args:
            record: The job.
            mark: What makes the event one of a kind in its job.
            message: What it says.
            level: info, warn or error.
            data: Numbers, of an event of metrics.
            at: Unix time; None is now.
        """
        event: Object = {
            "object": "fine_tuning.job.event", "id": made_id("ftevent-", record.id, mark),
            "created_at": int(time.time() if at is None else at), "level": level, "message": message,
            "data": data or {}, "type": "metrics" if data else "message",
        }  # fmt: skip
        if not self._index.has_event(str(event["id"])):
            self._append(record.id, "events.jsonl", event)
            self._index.add_events(record.id, [event])

    def add_checkpoint(self, record: JobRecord, step: int, at: float, metrics: Object) -> None:
        """Add a checkpoint to a job."""
        checkpoint: Object = {
            "object": "fine_tuning.job.checkpoint", "id": made_id("ftckpt_", record.id, str(step)),
            "created_at": int(at), "fine_tuned_model_checkpoint": record.checkpoint_name(step), "metrics": metrics,
            "fine_tuning_job_id": record.id, "step_number": step,
        }  # fmt: skip
        if self._index.get("checkpoint", str(checkpoint["id"])) is None:
            self._append(record.id, "checkpoints.jsonl", checkpoint)
            self._list_checkpoint(record, checkpoint)

    def kept_steps(self, record: JobRecord) -> set[int]:
        """Return the steps of the checkpoints that the job's run has kept."""
        folders = self.run(record.id).store.folders("checkpoints")
        return {int(name.rpartition("/")[2].split("-")[1]) for name in folders if name.startswith("checkpoints/step-")}

    def result(self, job: str) -> Path:
        """Return the directory of the weights that a job has ended with."""
        run = self.run(job)
        return self.depot.bring_folder(run.path / (run.pointed_at(FINAL) or FINAL))

    def keep_checkpoints(self, record: JobRecord, steps: set[int]) -> None:
        """Forget the checkpoints that the run has deleted."""
        rows, _ = self._index.listed("checkpoint", record.project, None, 1000, record.id)
        for row in rows:
            if row.data["step_number"] not in steps:
                self._index.delete("checkpoint", row.id)

    def relist(self) -> None:
        """List every job of the store in a new index."""
        folder = self.depot.path / "jobs"
        self.depot.bring_all(folder, "job.json", *_ROWS)
        records = [read_record(JobRecord, path) for path in folder.glob("ftjob-*/job.json")]
        for record in sorted(records, key=lambda record: record.created_at):
            self._list(record)
            self._index.add_events(record.id, read_lines(self.folder(record.id) / "events.jsonl"))
            kept = self.kept_steps(record)
            for checkpoint in read_lines(self.folder(record.id) / "checkpoints.jsonl"):
                if checkpoint["step_number"] in kept:
                    self._list_checkpoint(record, checkpoint)

    def _list_checkpoint(self, record: JobRecord, checkpoint: Object) -> None:
        self._index.put("checkpoint", Row(str(checkpoint["id"]), record.project, record.id, checkpoint))

    def _save(self, record: JobRecord) -> None:
        folder = self.folder(record.id)
        write_json(folder / "job.json", asdict(record))
        told = [folder / name for name in _ROWS]
        self.depot.send(folder / "job.json", *(path for path in told if path.exists()))

    def _list(self, record: JobRecord) -> None:
        """Index a job, and its result from the first checkpoint on by name."""
        self._index.put("job", Row(record.id, record.project, record.status, asdict(record)))
        if record.status in ENDS or record.step:
            data: Object = {"job": record.id, "created": record.finished_at or record.created_at}
            label = READY if record.has_model else "expected"
            self._index.put("model", Row(record.tuned_name, record.project, label, data))

    def _append(self, job: str, name: str, row: Object) -> None:
        with self._lock:
            writer = JsonlWriter(self.folder(job) / name)
            try:
                writer.append(row)
            finally:
                writer.close()


def read_run(run: Run) -> RunRecord | None:
    """Return run.json, as it is here; None while there is none."""
    try:
        return RunRecord.from_dict(read_json(run.run_json))
    except (OSError, ValueError, TypeError):
        return None
