"""Runs the training loop of one rank: one loop for every method, objective, ZeRO stage and world size.

Every rank runs the same collectives in the same order. A request to stop travels inside the all-reduce that
every step does anyway, so all ranks leave the loop after the same step; so does whether a save is in flight.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from dist_ft.config import Config
from dist_ft.data.stream.cache import open_split
from dist_ft.data.stream.loader import StepBatch
from dist_ft.errors import DivergedError
from dist_ft.evaluate.held_out import HeldOutSet, evaluate, inference
from dist_ft.messages import EvalDone, IntervalMeasured, Loaded, Outcome, Phase, PhaseChanged, SaveSkipped, StepDone
from dist_ft.metric_rows import EvalRow, Metrics, StepRow
from dist_ft.objectives.objective import Rows, Sums
from dist_ft.run.scores import Scores, best_first
from dist_ft.train.build import RankParts
from dist_ft.train.link import Link
from dist_ft.train.numbers import find_bad_numbers
from dist_ft.train.pace import AutoPace
from dist_ft.train.saving import Saver
from dist_ft.train.schedule import learning_rate
from dist_ft.train.timing import Stopwatch

_PATIENCE_S = 1.0
"""A rank that waits longer than this for its data reports it."""


@dataclass(frozen=True)
class Agreed:
    """What the ranks know about one another after a step.

    Attributes:
        stop: At least one rank was asked to stop.
        is_saving: At least one rank is still writing a checkpoint.
        is_due: Rank 0 says that a checkpoint is due (`checkpoint.every_steps: auto`).
    """

    stop: bool = False
    is_saving: bool = False
    is_due: bool = False


def run_loop(parts: RankParts, link: Link) -> tuple[Outcome, int]:
    """Trains until the run is complete or stopped; returns the outcome and the completed steps."""
    config, max_steps = parts.config, parts.spec.attempt.inputs.max_steps
    step = parts.start_step
    recent_losses = deque(parts.spec.attempt.recent_losses, maxlen=50)
    parts.engine.train()  # transformers loads models for inference
    saver = Saver(parts, link)
    pace = AutoPace(parts.spec.attempt.mtbf_s, time.monotonic()) if config.checkpoint.every_steps == "auto" else None
    link.send(Loaded(step, parts.bytes_read, parts.notes if parts.spec.rank == 0 else []))
    measured = list(parts.spec.attempt.evaluations)
    if step == 0:
        measured += _evaluate(parts, link, step)
    link.send(PhaseChanged(Phase.FIRST_STEP, step))
    agreed = Agreed()
    is_last = _is_last(config, measured, step, max_steps)
    while not is_last and not agreed.stop:
        saver.check()
        if step + 1 in parts.spec.attempt.skipped_steps:
            agreed = _pass_over(parts, link, step, saver.is_busy)
        else:
            agreed = _step(parts, link, step, recent_losses, saver, pace)
        step += 1
        if step == parts.start_step + 1:
            link.send(PhaseChanged(Phase.STEP, step))
        if _is_due(config.eval.every_steps, step) or step == max_steps:
            measured += _evaluate(parts, link, step)
        is_last = _is_last(config, measured, step, max_steps)
        if is_last or agreed.stop:
            saver.save(step, is_last=True)
        elif _is_best(config, measured, step, max_steps):
            _save(saver, step, pace)  # waits for the save in flight, because this one must not be skipped
        elif agreed.is_due or _is_due(config.checkpoint.every_steps, step):
            if not agreed.is_saving:
                _save(saver, step, pace)
            elif parts.spec.rank == 0 and pace is None:
                link.send(SaveSkipped(step))
    link.send(PhaseChanged(Phase.DRAIN, step))
    if step > parts.start_step:
        link.wait_committed(step)
    return ("completed" if is_last else "stopped"), step


def _save(saver: Saver, step: int, pace: AutoPace | None) -> None:
    """Begin a save, and tell the pace what it held up."""
    began = time.monotonic()
    saver.save(step)
    if pace is not None:
        pace.saved(time.monotonic() - began, time.monotonic())


def _is_last(config: Config, measured: Sequence[EvalRow], step: int, max_steps: int) -> bool:
    """Whether the run is complete. Every rank has the same numbers, so all decide alike."""
    stopping, every = config.eval.early_stopping, config.eval.every_steps
    if stopping is None or every is None:
        return step >= max_steps
    scores = Scores.of(measured, stopping.metric, every, max_steps)
    return step >= max_steps or scores.is_exhausted(stopping.patience, stopping.min_delta)


def _is_best(config: Config, measured: Sequence[EvalRow], step: int, max_steps: int) -> bool:
    """Whether the checkpoint of a step must be kept because it is one of the best so far."""
    return step in best_first(config.eval, lambda: measured, max_steps)[: config.checkpoint.keep_best]


def _step(
    parts: RankParts, link: Link, step: int, recent_losses: deque[float], saver: Saver, pace: AutoPace | None
) -> Agreed:
    """Run one optimizer step and return what the ranks agreed on."""
    began = time.perf_counter()
    is_saving = saver.is_busy
    engine, config, spec = parts.engine, parts.config, parts.spec
    own_part = Stopwatch(engine.device)  # until the first word with the other ranks
    batch = _next_batch(parts, link, step)
    data_s = time.perf_counter() - began
    objective = parts.objective
    num_sums = 1 + len(objective.metrics)
    # Loss and metrics, wishes to stop, saves in flight, whether one is due, seconds of each rank's own part.
    totals = torch.zeros(num_sums + 3 + spec.world_size, dtype=torch.float64, device=engine.device)
    divisor = objective.weight(batch.totals)
    step_mean = 0.0
    if objective.step_sum is not None:
        own_part.stop()
        step_mean = _add_up(parts, batch, objective.step_sum) / divisor
    lr_scale = learning_rate(config.schedule, 1.0, step, parts.spec.attempt.inputs.max_steps)
    grad_norm = 0.0
    for index, micro in enumerate(batch.micro_batches):
        parts.dropout_keys.step = step
        parts.dropout_keys.slots = torch.from_numpy(micro.slots)
        parts.dropout_keys.lengths = torch.from_numpy((micro.samples >= 0).sum(1))
        sums = engine(Rows.of(micro, engine.device, step_mean), objective.loss)
        if index == 0 and objective.step_sum is None:
            own_part.stop()
        # The divisor is the whole step's, known before it: shapes of the group cannot change a weight.
        engine.backward(sums[0] * (spec.world_size / divisor))
        totals[:num_sums] += sums.detach().double()
        if index + 1 < len(batch.micro_batches):
            engine.end_micro_step()
        else:
            saver.wait_copied()
            grad_norm = engine.apply_step(lr_scale)
    totals[num_sums] = float(link.should_stop())
    totals[num_sums + 1] = float(is_saving)
    totals[num_sums + 2] = float(spec.rank == 0 and pace is not None and pace.is_due(time.monotonic()))
    totals[num_sums + 3 + spec.rank] = own_part.seconds
    dist.all_reduce(totals)
    sums_of_step: list[float] = totals[:num_sums].tolist()
    loss = sums_of_step[0] / divisor
    wishes, num_saving, is_due, *local_s = totals[num_sums:].tolist()
    problem = find_bad_numbers(loss, grad_norm, recent_losses, config.failure.spike_factor)
    if problem is not None:
        # Before anything of this step is saved: a checkpoint of it would push out the last good ones.
        raise DivergedError(
            f"step {step + 1}: {problem}; the last checkpoint is from before. Lower optimizer.lr="
            f"{config.optimizer.lr}, look at the rows of this step, or set failure.bad_numbers",
            step + 1,
        )
    recent_losses.append(loss)
    if spec.rank == 0:
        step_s = time.perf_counter() - began
        metrics = dict(objective.means(objective.metrics, sums_of_step[1:], divisor))
        if parts.peak_flops is not None:
            flops = parts.flops_per_token * batch.totals.num_tokens
            metrics["mfu"] = round(flops / (step_s * parts.peak_flops * spec.world_size), 4)
        row = _row(
            parts, step, batch, loss=loss, grad_norm=grad_norm, step_s=step_s, data_s=data_s, metrics=metrics
        )  # fmt: skip
        link.send(StepDone(row, local_s))
        if pace is not None:
            _measure_pace(pace, link, row, bool(num_saving))
    return Agreed(bool(wishes), bool(num_saving), bool(is_due))


def _measure_pace(pace: AutoPace, link: Link, row: StepRow, is_saving: bool) -> None:
    """Tell the pace of a step, and the coordinator of a new interval."""
    pace.stepped(row.step_s, is_saving, time.monotonic())
    if pace.is_news():
        interval_s, cost_s = round(pace.interval_s, 3), round(pace.cost_s, 4)
        link.send(IntervalMeasured(row.step, interval_s, pace.num_quiet_steps, cost_s, round(pace.mtbf_s, 1)))


def _add_up(parts: RankParts, batch: StepBatch, sums: Sums) -> float:
    """Return a sum over all rows of a step, computed without gradient and dropout. Collective."""
    engine = parts.engine
    total = torch.zeros(1, dtype=torch.float64, device=engine.device)
    with inference(engine):
        for micro in batch.mismatched or batch.micro_batches:
            total += engine(Rows.of(micro, engine.device), sums).double()
    dist.all_reduce(total)
    return float(total)


def _next_batch(parts: RankParts, link: Link, step: int) -> StepBatch:
    """Return this rank's part of a step. A long wait for data is reported as a phase of its own."""
    if not parts.loader.is_ready(step, _PATIENCE_S):
        link.send(PhaseChanged(Phase.DATA, step))
        batch = parts.loader.step(step)
        link.send(PhaseChanged(Phase.FIRST_STEP if step == parts.start_step else Phase.STEP, step))
        return batch
    return parts.loader.step(step)


def _pass_over(parts: RankParts, link: Link, step: int, is_saving: bool) -> Agreed:
    """Skips the update of a step whose numbers were bad: the cursor moves on, weights and optimizer stay."""
    batch = _next_batch(parts, link, step)
    totals = torch.tensor([float(link.should_stop()), float(is_saving)], device=parts.engine.device)
    dist.all_reduce(totals)
    if parts.spec.rank == 0:
        link.send(StepDone(_row(parts, step, batch, loss=None, grad_norm=None, step_s=0.0, data_s=0.0, metrics={}), []))
    wishes, num_saving = totals.tolist()
    return Agreed(bool(wishes), bool(num_saving))


def _row(
    parts: RankParts,
    step: int,
    batch: StepBatch,
    *,
    loss: float | None,
    grad_norm: float | None,
    step_s: float,
    data_s: float,
    metrics: Metrics,
) -> StepRow:
    lr_scale = learning_rate(parts.config.schedule, 1.0, step, parts.spec.attempt.inputs.max_steps)
    return StepRow(
        step=step + 1,
        attempt=parts.spec.attempt.attempt,
        world_size=parts.spec.world_size,
        epoch=parts.loader.epoch(batch.position),
        position=batch.position,
        loss=loss,
        lr=parts.config.optimizer.lr * lr_scale,
        grad_norm=grad_norm,
        trained_tokens=batch.totals.num_trained_tokens,
        tokens=batch.totals.num_tokens,
        tokens_per_s=round(batch.totals.num_tokens / step_s, 2) if step_s else 0.0,
        step_s=round(step_s, 4),
        data_s=round(data_s, 4),
        digest=batch.digest,
        metrics=metrics,
    )


def _evaluate(parts: RankParts, link: Link, step: int) -> list[EvalRow]:
    """Measures the held-out sets, where there are any; returns the row."""
    if not parts.eval_sets:
        return []
    link.send(PhaseChanged(Phase.EVALUATE, step))
    sets = {
        name: HeldOutSet(open_split(split, parts.config.data.loader), parts.objective.weight(split.totals))
        for name, split in parts.eval_sets.items()
    }
    numbers = evaluate(parts.engine, parts.objective, sets, parts.layout, parts.engine.device)
    row = EvalRow(step, parts.spec.attempt.attempt, numbers)
    if parts.spec.rank == 0:
        link.send(EvalDone(row))
    link.send(PhaseChanged(Phase.STEP, step))
    return [row]


def _is_due(every: int | Literal["auto"] | None, step: int) -> bool:
    return isinstance(every, int) and step % every == 0
