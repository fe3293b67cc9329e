"""What clients ask of jobs and models: create, pause, resume, cancel, and the objects that they see."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

from dist_ft.run.place import Run
from dist_ft.service.api_keys import DEFAULT_PROJECT, Caller
from dist_ft.service.files.shelf import Shelf
from dist_ft.service.index import Index
from dist_ft.service.tuning.catalogue import BaseModel
from dist_ft.service.tuning.job_plan import Estimate, check_extensions, estimate, settle
from dist_ft.service.tuning.job_request import JobRequest, read_request
from dist_ft.service.tuning.job_store import CHECKPOINT_MARK, ENDS, READY, JobRecord, JobStore, read_run
from dist_ft.service.wire import ApiError, Json, Object, bad_request, new_id, whole_number

RETRY_WINDOW_S = 600.0
_PAGE = 500


@dataclass(frozen=True)
class Retry:
    """What a request says of being sent twice: `x-stainless-retry-count` and `Idempotency-Key`."""

    count: int = 0
    idempotency_key: str | None = None


@dataclass(frozen=True)
class TunedModel:
    """A fine-tuned model by its name: the job, and the step of a checkpoint; None is the result."""

    job: JobRecord
    step: int | None


class FineTuning:
    """Answers for jobs and models.

    Args:
        index: Where they are listed.
        jobs: The jobs.
        shelf: The files.
        catalogue: Base models by name.
        max_active: Jobs of a project that are not over at once.
    """

    def __init__(
        self, index: Index, jobs: JobStore, shelf: Shelf, catalogue: dict[str, BaseModel], max_active: int
    ) -> None:
        self._index, self._jobs, self._shelf, self._catalogue = index, jobs, shelf, catalogue
        self._max_active = max_active
        self._creating = threading.Lock()

    def create(self, body: Object, caller: Caller, retry: Retry) -> JobRecord:
        """Create a job, or return the one that the same request has made before.

        Raises:
            ApiError: The body is wrong, or the project has too many jobs.
        """
        digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        with self._creating:  # a retry may come while the first request is still being answered
            if (known := self._asked_before(digest, caller, retry)) is not None:
                return known
            request = read_request(body)
            record = self._new_record(request, caller)
            if len(self._jobs.active(caller.project)) >= self._max_active:
                error = ApiError(
                    429,
                    "This fine-tune request has been rate-limited. Your organization has reached the maximum of "
                    f"{self._max_active} active requests for the model '{request.model}'.",
                    code="rate_limit_exceeded",
                )
                error.headers["retry-after"] = "60"
                raise error
            marks = [f"body/{caller.key_id}/{digest}"]
            if retry.idempotency_key is not None:
                marks.append(_mark(caller, retry.idempotency_key))
            self._index.remember_asked(marks, record.id, digest)  # first: a retry must not make a second job
            self._jobs.add(record)
        return record

    def estimate(self, body: Object, caller: Caller) -> Estimate:
        """Return what a job would take, without making it.

        Raises:
            ApiError: The body is wrong, or its file cannot be trained on.
        """
        record = self._new_record(read_request(body), caller)
        training = self._shelf.find(record.request.training_file, caller.project)
        if training is None or training.num_examples == 0:
            raise bad_request(f"File '{record.request.training_file}' holds no example.", "training_file")
        settings = settle(record.settings, training.num_examples)
        return estimate(self._catalogue[record.base], settings, training.num_examples, training.num_characters)

    def find(self, job: str, caller: Caller) -> JobRecord:
        """Return a job of the caller's project.

        Raises:
            ApiError: There is none.
        """
        record = self._jobs.find(job, caller.project)
        if record is None:
            raise ApiError(404, f"Could not find fine tune: {job[:100]}", "fine_tune_id", "fine_tune_not_found")
        return record

    def page(
        self, caller: Caller, after: str | None, limit: int, metadata: dict[str, str] | None, is_null: bool
    ) -> tuple[list[JobRecord], bool]:
        """Return a page of jobs whose metadata hold these pairs, or of those without metadata."""
        if not metadata and not is_null:
            return self._jobs.page(caller.project, after, limit)
        found: list[JobRecord] = []
        has_more = True
        while has_more and len(found) <= limit:
            records, has_more = self._jobs.page(caller.project, after, _PAGE)
            after = records[-1].id if records else after
            for record in records:
                own = record.request.metadata
                if (is_null and own is None) or (not is_null and (metadata or {}).items() <= (own or {}).items()):
                    found.append(record)
        return found[:limit], len(found) > limit

    def cancel(self, job: str, caller: Caller) -> JobRecord:
        """Ask a job to end without a model; one that does not run yet ends at once.

        Raises:
            ApiError: There is none, or it is over.
        """
        self._check_open(self.find(job, caller), "cancelled")

        def cancelled(old: JobRecord) -> JobRecord:
            self._check_open(old, "cancelled")
            wanted = replace(old, wanted="cancel")
            return wanted if old.status == "running" else wanted.ended("cancelled")

        record = self._jobs.change(job, cancelled)
        if record.status == "cancelled":
            self._jobs.tell(record, "cancelled", "The job was cancelled")
        return record

    def pause(self, job: str, caller: Caller) -> JobRecord:
        """Ask a job to stop behind a checkpoint; one that does not run yet is paused at once.

        Raises:
            ApiError: There is none, or it is over, or about to be cancelled.
        """
        self._check_open(self.find(job, caller), "paused")

        def paused(old: JobRecord) -> JobRecord:
            self._check_open(old, "paused")
            if old.wanted == "cancel":
                raise bad_request(f"Job {job} is being cancelled and cannot be paused.")
            wanted = replace(old, wanted="pause")
            return wanted if old.status == "running" else replace(wanted, status="paused")

        record = self._jobs.change(job, paused)
        if record.status == "paused":
            self._jobs.tell(record, f"paused-{record.num_starts}-{int(time.time())}", "The job was paused")
        return record

    def resume(self, job: str, caller: Caller) -> JobRecord:
        """Let a paused job go on.

        Raises:
            ApiError: There is none, or it is not paused.
        """
        self._check_open(self.find(job, caller), "resumed")

        def resumed(old: JobRecord) -> JobRecord:
            self._check_open(old, "resumed")
            if old.wanted != "pause":
                raise bad_request(f"Job {job} has status {old.status} and cannot be resumed; only a paused job can.")
            status = "queued" if old.num_examples else "validating_files"
            return replace(old, wanted="run", status=status if old.status == "paused" else old.status)

        record = self._jobs.change(job, resumed)
        self._jobs.tell(record, f"resumed-{record.num_starts}-{int(time.time())}", "The job was resumed")
        return record

    def to_wire(self, record: JobRecord) -> Object:
        """Return the API's object of a job."""
        request = record.request
        settings = record.settings.to_wire()
        method: Object = {"type": request.method, request.method: {"hyperparameters": settings}}
        error = record.error
        problem: Object = {} if error is None else {"code": error.code, "param": error.param, "message": error.message}
        integrations: list[Json] = [
            {
                "type": "wandb",
                "wandb": {
                    "project": w.project, "name": w.name, "entity": w.entity, "tags": list(w.tags), "run_id": record.id,
                },
            }
            for w in request.integrations
        ]  # fmt: skip
        return {
            "object": "fine_tuning.job", "id": record.id, "model": request.model, "created_at": record.created_at,
            "finished_at": record.finished_at,
            "fine_tuned_model": record.tuned_name if record.status == "succeeded" else None,
            "organization_id": f"org-{record.project}",
            "result_files": [] if record.result_file is None else [record.result_file],
            "status": record.status, "validation_file": request.validation_file, "training_file": request.training_file,
            "hyperparameters": settings if request.method == "supervised" else None,
            "trained_tokens": record.trained_tokens, "error": problem, "user_provided_suffix": request.suffix,
            "seed": request.seed, "estimated_finish": record.estimated_finish, "integrations": integrations,
            "method": method, "metadata": None if request.metadata is None else dict(request.metadata),
            "usage_metrics": None, "shared_with_openai": False, "dist_ft": self._known_of(record),
        }  # fmt: skip

    def tuned(self, name: str, caller: Caller) -> TunedModel | None:
        """Return the fine-tuned model of a name; None if the project has none."""
        tuned_name, _, step = name.partition(CHECKPOINT_MARK)
        row = self._index.get("model", tuned_name, caller.project)
        job = None if row is None else self._jobs.find(str(row.data["job"]), caller.project)
        if job is None:
            return None
        if not step:
            return TunedModel(job, None) if job.has_model else None
        number = whole_number(step)
        return TunedModel(job, number) if number in self._jobs.kept_steps(job) else None

    def models(self, caller: Caller) -> list[Object]:
        """Return base models in the catalogue's order, then the project's own, the newest first."""
        rows, _ = self._index.listed("model", caller.project, None, 10_000, READY)
        own = [_model_object(row.id, row.data["created"], row.project) for row in rows]
        return [*(base.to_wire() for base in self._catalogue.values()), *own]

    def model(self, name: str, caller: Caller) -> Object:
        """Return a model's object.

        Raises:
            ApiError: There is none.
        """
        if name in self._catalogue:
            return self._catalogue[name].to_wire()
        found = self.tuned(name, caller)
        if found is None:
            raise _no_model(name)
        job = found.job
        return _model_object(name, job.finished_at or job.created_at, job.project)

    def delete_model(self, name: str, caller: Caller) -> Object:
        """Delete a fine-tuned model with its weights.

        Raises:
            ApiError: There is none, or it is a base model.
        """
        if name in self._catalogue:
            raise ApiError(403, f"The model '{name}' is a base model and cannot be deleted.", "model")
        found = self.tuned(name, caller)
        if found is None or found.step is not None:
            raise _no_model(name)
        self._jobs.change(found.job.id, lambda old: replace(old, has_model=False))
        self._jobs.depot.remove(self._jobs.run(found.job.id).exports)
        return {"id": name, "object": "model", "deleted": True}

    def run(self, record: JobRecord) -> Run:
        """Return the run of a job, which may not have begun."""
        return self._jobs.run(record.id)

    def weights(self, record: JobRecord) -> Path:
        """Return the directory of a job's exported weights.

        Raises:
            ApiError: It has none.
        """
        if not record.has_model:
            raise ApiError(404, f"Job {record.id} has no weights; its status is {record.status}.")
        return self._jobs.result(record.id)

    def _new_record(self, request: JobRequest, caller: Caller) -> JobRecord:
        base, start = self._base_of(request.model, caller)
        for param, file_id in (("training_file", request.training_file), ("validation_file", request.validation_file)):
            if file_id is None:
                continue
            stored = self._shelf.find(file_id, caller.project)
            if stored is None:
                raise bad_request(f"invalid {param}: {file_id}", param)
            if stored.purpose != "fine-tune":
                raise bad_request(f"File '{file_id}' has purpose '{stored.purpose}'; expected 'fine-tune'.", param)
        check_extensions(self._catalogue[base], request)
        slug = re.sub(r"[^A-Za-z0-9_.-]+", "-", request.suffix or "")
        org = "personal" if caller.project == DEFAULT_PROJECT else caller.project
        return JobRecord(
            id=new_id("ftjob-"), project=caller.project, created_at=int(time.time()), request=request, base=base,
            start_job=None if start is None else start.job.id, start_step=None if start is None else start.step,
            settings=request.hyperparameters, tuned_name=f"ft:{base}:{org}:{slug}:{new_id('', 8)}",
        )  # fmt: skip

    def _base_of(self, name: str, caller: Caller) -> tuple[str, TunedModel | None]:
        if name in self._catalogue:
            return name, None
        start = self.tuned(name, caller)
        if start is None or start.job.base not in self._catalogue:
            raise _no_model(name)
        return start.job.base, start

    def _asked_before(self, digest: str, caller: Caller, retry: Retry) -> JobRecord | None:
        known = None
        if retry.idempotency_key is not None:
            known = self._index.job_asked_for([_mark(caller, retry.idempotency_key)], 0.0)
            if known is not None and known[1] != digest:
                raise bad_request("This Idempotency-Key was used with another body.")
        if known is None and retry.count > 0:
            known = self._index.job_asked_for([f"body/{caller.key_id}/{digest}"], time.time() - RETRY_WINDOW_S)
        return None if known is None else self._jobs.find(known[0], caller.project)

    @staticmethod
    def _check_open(record: JobRecord, verb: str) -> None:
        if record.status in ENDS:
            raise bad_request(f"Job {record.id} has status {record.status} and cannot be {verb}.")

    def _known_of(self, record: JobRecord) -> Object:
        known: Object = {
            "run_dir": self._jobs.run(record.id).address, "step": record.step, "max_steps": record.max_steps,
            "num_examples": record.num_examples, "wanted": record.wanted,
            "estimate": None if record.estimate is None else record.estimate.to_wire(),
            "best_checkpoint": None if record.best_step is None else record.checkpoint_name(record.best_step),
        }  # fmt: skip
        if record.status == "running" and (state := read_run(self._jobs.run(record.id))) is not None:
            known |= {"world_size": state.world_size, "attempts": state.attempt, "run_state": state.state}
        return known


def _mark(caller: Caller, key: str) -> str:
    return f"key/{caller.project}/{hashlib.sha256(key.encode()).hexdigest()[:40]}"


def _no_model(name: str) -> ApiError:
    return ApiError(404, f"The model '{name[:200]}' does not exist", "model", "model_not_found")


def _model_object(name: str, created: Json, project: str) -> Object:
    return {"id": name, "object": "model", "created": created, "owned_by": f"org-{project}", "shutdown_date": None}
