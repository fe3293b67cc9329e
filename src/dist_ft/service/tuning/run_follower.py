"""Reads what a run has added to its files since the last look, and tells it as events and checkpoints of the job."""

from __future__ import annotations

import contextlib
import io
import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from dist_ft.config.yaml_file import read_yaml
from dist_ft.layout import RunDir
from dist_ft.metric_rows import EvalRow, StepRow
from dist_ft.run.events import Committed, read_ledger
from dist_ft.run.log import read_evals, read_steps
from dist_ft.run.state import RunRecord
from dist_ft.service.tuning.job_store import JobRecord, JobStore
from dist_ft.service.wire import Object

CSV_HEADER = "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy\n"


@dataclass
class Tail:
    """How far the files of a run have been read by this process.

    Attributes:
        told: Last step that was told.
        offset: Bytes of metrics.jsonl that were read.
        waiting: Rows that were read and not told yet.
        losses: Training loss of each step that was told.
        ledger_size: Bytes of the ledger when it was read last.
        commits: Checkpoints that were seen and not told yet: step and time.
        seen_commits: Steps of those that were told.
    """

    told: int = 0
    offset: int = 0
    waiting: list[StepRow] = field(default_factory=list)
    losses: dict[int, float | None] = field(default_factory=dict)
    ledger_size: int = 0
    commits: dict[int, float] = field(default_factory=dict)
    seen_commits: set[int] = field(default_factory=set)


def follow(jobs: JobStore, record: JobRecord, tail: Tail, state: RunRecord, is_over: bool) -> JobRecord:
    """Tell the steps and checkpoints that are new. Returns the record with its progress."""
    run = jobs.run(record.id)
    tail.waiting += _new_rows(run.metrics, tail)
    evals = read_evals(run.evals) if run.evals.exists() and tail.waiting else {}
    has_held_out = record.request.validation_file is not None
    every = _steps_between_evals(run) if has_held_out and tail.waiting else None
    commits = _new_commits(run, tail)
    last = None
    while tail.waiting:
        row = tail.waiting[0]
        is_due = row.step == state.max_steps or (every is not None and row.step % every == 0)
        if has_held_out and is_due and row.step not in evals and len(tail.waiting) == 1 and not is_over:
            break  # its evaluation is on the way
        last = tail.waiting.pop(0)
        _tell_step(jobs, record, row, evals.get(row.step), state.max_steps)
        tail.told = max(tail.told, row.step)
        tail.losses[row.step] = row.loss
        if row.step in commits:
            _tell_checkpoint(jobs, record, row.step, commits.pop(row.step), tail)
    for step in [step for step in commits if step <= tail.told]:
        _tell_checkpoint(jobs, record, step, commits.pop(step), tail)
    tail.commits = commits
    if last is None or last.step <= record.step:
        return record
    left = (state.max_steps - last.step) * last.step_s
    step, finish = last.step, int(time.time() + left) + 1

    def progressed(old: JobRecord) -> JobRecord:
        return replace(old, step=step, max_steps=state.max_steps, num_losses=0, estimated_finish=finish)

    return jobs.change(record.id, progressed)


def trained_tokens(run: RunDir, last: int) -> int:
    """Return the tokens of all steps that count."""
    return sum(row.tokens for step, row in read_steps(run.metrics).items() if step <= last)


def metrics_csv(run: RunDir, last: int) -> io.BytesIO:
    """Return the result file: a row a step, empty where nothing was measured."""
    evals = read_evals(run.evals) if run.evals.exists() else {}
    lines = [CSV_HEADER]
    for step, row in sorted(read_steps(run.metrics).items()):
        if step > last:
            continue
        measured = evals[step].metrics if step in evals else {}
        numbers = (
            row.loss, row.metrics.get("token_accuracy", row.metrics.get("rewards/accuracies")),
            measured.get("eval_loss"), measured.get("token_accuracy"),
        )  # fmt: skip
        lines.append(",".join([str(step), *("" if n is None else f"{n:.5f}" for n in numbers)]) + "\n")
    return io.BytesIO("".join(lines).encode())


def _new_rows(path: Path, tail: Tail) -> list[StepRow]:
    """Return the rows that were added, whole lines only."""
    if not path.exists() or path.stat().st_size <= tail.offset:
        return []
    with path.open("rb") as file:
        file.seek(tail.offset)
        text = file.read()
    whole = text[: text.rfind(b"\n") + 1]
    tail.offset += len(whole)
    rows = []
    for line in whole.splitlines():
        with contextlib.suppress(ValueError):
            rows.append(StepRow.from_dict(json.loads(line)))
    return rows


def _steps_between_evals(run: RunDir) -> int | None:
    """Return how many steps lie between two measurements of held-out data; None: it is measured at the end alone."""
    section = read_yaml(run.config)["eval"]
    every = section["every_steps"] if isinstance(section, dict) else None
    return every if isinstance(every, int) else None


def _held_out(measured: EvalRow | None) -> Object:
    """Return the numbers of held-out data by their names in OpenAI's objects; empty if nothing was measured."""
    if measured is None or measured.eval_loss is None:
        return {}
    numbers: Object = {"valid_loss": measured.eval_loss, "full_valid_loss": measured.eval_loss}
    if (accuracy := measured.metrics.get("token_accuracy")) is not None:
        numbers |= {"valid_mean_token_accuracy": accuracy, "full_valid_mean_token_accuracy": accuracy}
    return numbers


def _tell_step(jobs: JobStore, record: JobRecord, row: StepRow, measured: EvalRow | None, total: int) -> None:
    numbers: Object = {"step": row.step, "train_loss": row.loss, "total_steps": total}
    text = "none" if row.loss is None else f"{row.loss:.2f}"
    message = f"Step {row.step}/{total}: training loss={text}"
    if row.metrics.get("token_accuracy") is not None:
        numbers["train_mean_token_accuracy"] = row.metrics["token_accuracy"]
    for name, value in row.metrics.items():
        if name.startswith(("rewards/", "logps/")):
            numbers[name] = value
    if held_out := _held_out(measured):
        numbers |= held_out
        loss = held_out["valid_loss"]
        message += f", validation loss={loss:.2f}, full validation loss={loss:.2f}"
    jobs.tell(record, f"step-{row.step}", message, data=numbers)


def _new_commits(run: RunDir, tail: Tail) -> dict[int, float]:
    """Return the checkpoints that were not told yet: step and time of each."""
    size = run.ledger.stat().st_size if run.ledger.exists() else 0
    if size == tail.ledger_size:
        return tail.commits
    tail.ledger_size = size
    found = {entry.event.step: entry.time for entry in read_ledger(run.ledger) if isinstance(entry.event, Committed)}
    return {step: at for step, at in found.items() if step not in tail.seen_commits}


def _tell_checkpoint(jobs: JobStore, record: JobRecord, step: int, at: float, tail: Tail) -> None:
    run = jobs.run(record.id)
    tail.seen_commits.add(step)
    metrics: Object = {"step": step}
    if step in tail.losses:
        metrics["train_loss"] = tail.losses[step]
    evals = read_evals(run.evals) if run.evals.exists() else {}
    jobs.add_checkpoint(record, step, at, metrics | _held_out(evals.get(step)))
    losses = {row.eval_loss: at for at, row in evals.items() if at in tail.seen_commits and row.eval_loss is not None}
    if losses:
        best = losses[min(losses)]
        jobs.change(record.id, lambda old: replace(old, best_step=best))
    name = record.checkpoint_name(step)
    jobs.tell(record, f"checkpoint-{step}", f"Checkpoint created at step {step} with Snapshot ID: {name}")
    jobs.keep_checkpoints(record, jobs.kept_steps(record) | {step})
