"""The one process that moves jobs on: validates, starts, follows, stops and finishes them.

It holds a lease in the index, so that of several servers of one store one dispatches. All it knows is in the store:
after a restart it looks at each active job again, and goes on where the run is. Starting and stopping wait for other
processes and have threads of their own; everything else happens in turns of one thread.
"""

from __future__ import annotations

import json
import logging
import math
import subprocess
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from dist_ft.config.adapter_settings import adapter_settings
from dist_ft.errors import DistFtError
from dist_ft.launchers.launcher import Job, Launcher, RunAtWorkError, SubmitRequest
from dist_ft.machine import OWN_PYTHON
from dist_ft.printable import printable
from dist_ft.run.state import FINAL, RunRecord
from dist_ft.service.files.file_rules import write_clean
from dist_ft.service.files.shelf import RESULTS, Shelf, StoredFile
from dist_ft.service.index import Index
from dist_ft.service.tuning.catalogue import BaseModel
from dist_ft.service.tuning.job_plan import RunFiles, estimate, run_config, settle
from dist_ft.service.tuning.job_store import JobError, JobRecord, JobStore
from dist_ft.service.tuning.run_follower import Tail, follow, metrics_csv, trained_tokens
from dist_ft.service.wire import Object, made_id, new_id

logger = logging.getLogger(__name__)

MIN_TRAINING_EXAMPLES = 10
_LEASE, _LEASE_S = "dispatcher", 15.0
_STOP_LIMIT_S = 900.0
_MAX_LOSSES = 3
_MESSAGE = 2000
_FAULTS_TOLD = 50


@dataclass(frozen=True)
class Place:
    """Where jobs run: a launcher, and how many jobs it takes at once."""

    launcher: Launcher
    max_running: int


class Dispatcher:
    """Moves jobs on until it is closed.

    Args:
        index: Holds the lease.
        jobs: The jobs.
        shelf: The files.
        catalogue: Base models by name.
        place: Where jobs run.
        every_s: Seconds between two turns.
    """

    def __init__(
        self,
        index: Index,
        jobs: JobStore,
        shelf: Shelf,
        catalogue: dict[str, BaseModel],
        place: Place,
        every_s: float = 0.5,
    ) -> None:
        self._index, self._jobs, self._shelf, self._catalogue, self._place = index, jobs, shelf, catalogue, place
        self._every_s = every_s
        self._name = new_id("dispatcher-", 12)
        self._tails: dict[str, Tail] = {}
        self._looked: dict[str, float] = {}
        self._starts: dict[str, Future[None]] = {}
        self._stops: dict[str, threading.Thread] = {}
        self._pool = ThreadPoolExecutor(4, thread_name_prefix="start")
        self._closing, self._nudge = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="dispatcher", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def nudge(self) -> None:
        """Begin the next turn at once."""
        self._nudge.set()

    def close(self) -> None:
        """End after the current turn; runs go on."""
        self._closing.set()
        self._nudge.set()
        if self._thread.is_alive():
            self._thread.join(30)
        self._pool.shutdown(cancel_futures=True)  # a start that is under way is waited for and recorded
        self._index.give_lease_back(_LEASE, self._name)

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                if self._index.take_lease(_LEASE, self._name, _LEASE_S):
                    self.turn()
            except Exception:  # a database or disk that is away for a moment must not end the service
                logger.exception("a turn of the dispatcher failed; the next one is in %g s", self._every_s)
            self._nudge.wait(self._every_s)
            self._nudge.clear()

    def turn(self) -> None:
        """Look at every active job once."""
        active = self._jobs.active()
        num_running = sum(record.status == "running" for record in active)
        for record in active:
            try:
                if record.status == "validating_files":
                    self._validate(record)
                elif record.status == "running":
                    self._look(record)
                elif record.status == "queued" and num_running < self._place.max_running and self._begin(record):
                    num_running += 1
            except Exception:
                logger.exception("job %s: the dispatcher failed on it", record.id)

    def _validate(self, record: JobRecord) -> None:
        request = record.request
        and_held_out = f" and validation file: {request.validation_file}" if request.validation_file else ""
        self._jobs.tell(record, "validating", f"Validating training file: {request.training_file}{and_held_out}")
        training = self._shelf.find(request.training_file, record.project)
        held_out = self._shelf.find(request.validation_file, record.project) if request.validation_file else None
        error = _file_error(training, "training_file", request.method, request.training_file, MIN_TRAINING_EXAMPLES)
        if error is None and request.validation_file is not None:
            error = _file_error(held_out, "validation_file", request.method, request.validation_file, 1)
        if error is None and held_out and training and held_out.format != training.format:
            error = JobError(
                "invalid_validation_file", "validation_file",
                f"The validation file holds {held_out.format} examples, the training file {training.format} ones.",
            )  # fmt: skip
        if error is not None or training is None:
            self._fail(record, error or JobError("invalid_training_file", "training_file", "The file is gone."))
            return
        folder = self._jobs.folder(record.id)
        for stored, name in ((training, "train.jsonl"), (held_out, "valid.jsonl")):
            if stored is not None:
                write_clean(self._shelf.content(stored.id), folder / name)
                self._jobs.depot.send(folder / name)
        settings = settle(request.hyperparameters, training.num_examples)
        count, row_format = training.num_examples, training.format
        expected = estimate(self._catalogue[record.base], settings, count, training.num_characters)

        def queued(old: JobRecord) -> JobRecord:
            if old.status != "validating_files":  # cancelled or paused in between
                return old
            return replace(
                old, num_examples=count, format=row_format, settings=settings, status="queued", estimate=expected
            )

        self._jobs.tell(record, "validated", "Files validated, moving job to queued state")
        self._jobs.change(record.id, queued)

    def _begin(self, record: JobRecord) -> bool:
        """Start a run, in a thread; return False if the client has changed its mind."""
        state = self._jobs.fetched(record.id)
        if state is not None and state.state == "completed":  # an earlier server died before it knew of its start
            self._tell_start(record)
            self._succeed(follow(self._jobs, record, Tail(record.step), state, is_over=True), state)
            return False

        def running(old: JobRecord) -> JobRecord:
            is_wanted = old.status == "queued" and old.wanted == "run"
            return replace(old, status="running", launched_as=None) if is_wanted else old

        begun = self._jobs.change(record.id, running)
        if begun.status != "running":
            return False
        self._starts[record.id] = self._pool.submit(self._launch, begun)
        return True

    def _launch(self, record: JobRecord) -> None:
        try:
            path = self._jobs.folder(record.id) / "config.yaml"
            path.write_text(json.dumps(self._config_of(record), indent=1), encoding="utf-8")
            can_resume = self._jobs.run(record.id).has("")
            name = self._place.launcher.submit(SubmitRequest(path, resume=can_resume, preflight=False)).job
        except RunAtWorkError as error:  # the server died between a start and its record
            name = error.job
        except DistFtError as error:
            self._fail(record, JobError("server_error", None, printable(str(error), _MESSAGE)))
            return
        except Exception as error:
            logger.exception("job %s could not be started", record.id)
            self._fail(record, JobError("server_error", None, f"The run could not be started: {type(error).__name__}."))
            return
        self._tell_start(record)
        self._jobs.change(record.id, lambda old: replace(old, launched_as=name, num_starts=old.num_starts + 1))

    def _tell_start(self, record: JobRecord) -> None:
        again = "" if record.num_starts == 0 else " again, after the last checkpoint"
        self._jobs.tell(record, f"started-{record.num_starts + 1}", f"Fine-tuning job started{again}")

    def _config_of(self, record: JobRecord) -> Object:
        folder, request = self._jobs.folder(record.id), record.request
        held_out = folder / "valid.jsonl" if request.validation_file else None
        start = self._start_of(record)
        adapter_base = None
        if start is not None and (Path(start) / "adapter_config.json").is_file():
            adapter_base = str(adapter_settings(start)["base_model_name_or_path"])
        depot = self._jobs.depot
        files = RunFiles(
            depot.address_of(depot.path / "runs"), depot.address_of(folder / "train.jsonl"),
            None if held_out is None else depot.address_of(held_out), record.format or "chat", start, adapter_base,
        )  # fmt: skip
        return run_config(record.id, request, self._catalogue[record.base], record.settings, record.num_examples, files)

    def _start_of(self, record: JobRecord) -> str | None:
        """Return the export that a job starts from, and make that of a checkpoint."""
        if record.start_job is None:
            return None
        earlier = self._jobs.run(record.start_job).address
        if record.start_step is None:
            return str(self._jobs.result(record.start_job))
        target = self._jobs.folder(record.id) / "start"
        if not target.exists():
            command = [
                *OWN_PYTHON,
                "-m",
                "dist_ft.cli",
                "export",
                earlier,
                "--step",
                str(record.start_step),
                "--to",
                str(target),
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_STOP_LIMIT_S)
            if done.returncode != 0:
                raise DistFtError(
                    f"the checkpoint at step {record.start_step} cannot be used: {done.stderr.strip()[-500:]}"
                )
        return str(target)

    def _look(self, record: JobRecord) -> None:
        started = self._starts.get(record.id)
        if started is not None and not started.done():
            return
        self._starts.pop(record.id, None)
        record = self._jobs.find(record.id) or record
        if record.status != "running":
            return
        if record.launched_as is None:  # the server died before it knew
            self._jobs.change(record.id, lambda old: replace(old, status="queued"))
            return
        run = self._jobs.run(record.id)
        if time.monotonic() - self._looked.get(record.id, -math.inf) < run.look_every_s:
            return
        self._looked[record.id] = time.monotonic()
        job = self._place.launcher.status(record.launched_as)
        state = self._jobs.fetched(record.id)
        if state is not None:
            tail = self._tails.setdefault(record.id, Tail(record.step))
            record = follow(self._jobs, record, tail, state, job.is_over)
        if not job.is_over:
            if record.launched_as is not None and record.wanted != "run" and record.id not in self._stops:
                # A daemon: a server that ends does not wait for a run that does.
                stopping = threading.Thread(target=self._stop, args=(record.id, record.launched_as), daemon=True)
                self._stops[record.id] = stopping
                stopping.start()
            return
        self._stops.pop(record.id, None)
        self._tails.pop(record.id, None)
        self._looked.pop(record.id, None)
        self._finish(record, job, state)

    def _stop(self, job: str, launched_as: str) -> None:
        try:
            self._place.launcher.stop(launched_as, _STOP_LIMIT_S)
        except DistFtError as error:
            logger.info("job %s: %s", job, error)  # that it has ended, or failed: the next look sees it

    def _finish(self, record: JobRecord, job: Job, state: RunRecord | None) -> None:
        """Settle a job whose run is over."""
        if state is not None and state.state == "completed":
            self._succeed(record, state)
        elif record.wanted == "cancel":
            self._jobs.tell(record, "cancelled", "The job was cancelled")
            self._jobs.change(record.id, lambda old: old.ended("cancelled"))
        elif record.wanted == "pause":
            self._jobs.tell(record, f"paused-{record.num_starts}", "The job was paused behind a checkpoint")
            self._jobs.change(record.id, lambda old: replace(old, status="paused", estimated_finish=None))
        elif state is not None and state.state == "stopped":
            self._jobs.change(record.id, lambda old: replace(old, status="queued"))
        elif state is not None and state.state == "failed" and state.error is not None:
            kind = "invalid_training_file" if state.error["type"] == "DataError" else "server_error"
            self._fail(
                record,
                JobError(kind, "training_file" if kind != "server_error" else None, _short(state.error["message"])),
            )
        elif job.exit_code in (1, 2) and (state is None or state.state in FINAL):
            said = [
                line[7:]
                for line in self._place.launcher.logs(job.submission_id).splitlines()
                if line.startswith("error: ")
            ]
            self._fail(
                record, JobError("server_error", None, _short("\n".join(said) or "The run ended without saying why."))
            )
        elif record.num_losses >= _MAX_LOSSES:
            self._fail(
                record, JobError("server_error", None, _short(job.message or "The run was lost again and again."))
            )
        else:
            self._jobs.tell(
                record, f"lost-{record.num_starts}", "The run was lost; it goes on after its last checkpoint", "warn"
            )
            self._jobs.change(record.id, lambda old: replace(old, status="queued", num_losses=old.num_losses + 1))

    def _succeed(self, record: JobRecord, state: RunRecord) -> None:
        run = self._jobs.run(record.id)
        result_file = made_id("file-", record.id, "step_metrics")  # the same if the server dies before the job knows it
        self._shelf.add(metrics_csv(run, state.step), "step_metrics.csv", RESULTS, record.project, file_id=result_file)
        tokens = trained_tokens(run, state.step)
        self._jobs.tell(record, "model", f"New fine-tuned model created: {record.tuned_name}")
        self._jobs.tell(record, "succeeded", "The job has successfully completed")

        def succeeded(old: JobRecord) -> JobRecord:
            ended = old.ended("succeeded")
            return replace(
                ended,
                has_model=True,
                result_file=result_file,
                trained_tokens=tokens,
                step=state.step,
                max_steps=state.max_steps,
            )

        self._jobs.change(record.id, succeeded)

    def _fail(self, record: JobRecord, error: JobError) -> None:
        self._jobs.tell(record, "failed", error.message, "error")
        self._jobs.change(record.id, lambda old: old.ended("failed", error))


def _short(message: str) -> str:
    return printable(message, _MESSAGE)


def _file_error(stored: StoredFile | None, param: str, method: str, file_id: str, least: int) -> JobError | None:
    """Return why a file cannot be used; None if it can."""
    code, name = f"invalid_{param}", param.replace("_", " ")
    if stored is None:
        return JobError(code, param, f"The {name} {file_id} is gone.")
    if stored.status == "error":
        lines = (stored.status_details or "").splitlines()
        first = lines[0].partition(": ")[2]
        is_jsonl = first.startswith("Expected file to have JSONL format")
        begin = "" if is_jsonl else f"The job failed due to an invalid {name}. "
        message = "\n".join([f"{begin}{first}", *lines[1:_FAULTS_TOLD]])
        return JobError("invalid_file_format" if is_jsonl else code, param, message)
    wanted = "dpo" if stored.format == "preference" else "supervised"
    if wanted != method:
        spoken = "fine-tune-preference" if stored.format == "preference" else "fine-tune-chat"
        return JobError(
            code, param,
            f"The job failed due to an invalid {name}. Input file {file_id} is in the {spoken} format, but the "
            f"specified fine-tuning job is not using '{wanted}' as the training method (provided method={method}).",
        )  # fmt: skip
    if stored.num_examples < least:
        spoken = f"{name.capitalize()} has {stored.num_examples} example(s), but must have at least {least} examples"
        return JobError("invalid_n_examples", param, spoken)
    return None
