"""The training loop of one rank: one loop for full and LoRA, every stage and world size.

Every rank runs the same collectives in the same order. A request to stop travels inside the all-reduce that
every step does anyway, so all ranks leave the loop after the same step.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from dist_ft.checkpoint.snapshot import write_slices
from dist_ft.checkpoint.store import LocalStore
from dist_ft.errors import DivergedError
from dist_ft.messages import EvalDone, Loaded, Message, Outcome, PhaseChanged, Staged, StepDone
from dist_ft.rundir import checkpoint_name, slices_name
from dist_ft.state import Cursor
from dist_ft.stream.loader import StepBatch
from dist_ft.train.build import RankParts
from dist_ft.train.evaluate import evaluate_loss, probe_logits
from dist_ft.train.schedule import learning_rate
from dist_ft.train.tensors import to_device
from dist_ft.zero.engine import apply_step
from dist_ft.zero.slices import collect_slices, group_settings, optimizer_step

logger = logging.getLogger(__name__)


class Link(Protocol):
    """The rank's connection to the coordinator. `send` never blocks a step."""

    def send(self, message: Message) -> None:
        """Queues a message."""
        ...

    def should_stop(self) -> bool:
        """Whether a stop was asked for, as far as this rank knows."""
        ...

    def wait_committed(self, step: int) -> None:
        """Blocks until the checkpoint of `step` exists. Raises CheckpointError after its limit."""
        ...


def run_loop(parts: RankParts, link: Link) -> tuple[Outcome, int]:
    """Trains to the end, or to a stop. Returns how it ended and the completed steps."""
    config, max_steps = parts.config, parts.spec.attempt.max_steps
    step = parts.start_step
    saved_step = step if parts.spec.attempt.start_checkpoint else -1
    parts.engine.train()  # transformers loads models for inference
    link.send(Loaded(step, parts.bytes_read, parts.notes if parts.spec.rank == 0 else []))
    if step == 0:
        _evaluate(parts, link, step)
    link.send(PhaseChanged("first_step", step))
    stop = False
    while step < max_steps and not stop:
        stop = _step(parts, link, step)
        step += 1
        if step == parts.start_step + 1:
            link.send(PhaseChanged("step", step))
        is_last = step == max_steps
        if _is_due(config.eval.every_steps, step) or is_last:
            _evaluate(parts, link, step)
        if _is_due(config.checkpoint.every_steps, step) or is_last or stop:
            _save(parts, link, step)
            saved_step = step
    link.send(PhaseChanged("drain", step))
    if saved_step > parts.start_step:
        link.wait_committed(saved_step)
    return ("completed" if step >= max_steps else "stopped"), step


def _step(parts: RankParts, link: Link, step: int) -> bool:
    """Runs one optimizer step; returns whether the ranks agreed to stop after it."""
    began = time.perf_counter()
    batch = parts.loader.step(step)
    data_s = time.perf_counter() - began
    engine, config = parts.engine, parts.config
    totals = torch.zeros(2, dtype=torch.float64, device=engine.device)  # loss sum, wishes to stop
    scale = parts.spec.world_size / batch.num_trained_tokens
    lr_scale = learning_rate(config.schedule, 1.0, step, parts.spec.attempt.max_steps)
    grad_norm = 0.0
    for index, micro in enumerate(batch.micro_batches):
        parts.dropout_keys.step = step
        parts.dropout_keys.slots = torch.from_numpy(micro.slots)
        loss_sum = engine(*to_device(micro, engine.device))
        # The divisor is the whole step's, known before it: shapes of the group cannot change a weight.
        engine.backward(loss_sum * scale, scale_wrt_gas=False)
        totals[0] += loss_sum.detach().double()
        if index + 1 < len(batch.micro_batches):
            engine.step()
        else:
            grad_norm = apply_step(engine, lr_scale)
    totals[1] = float(link.should_stop())
    dist.all_reduce(totals)
    loss_total, wishes = totals.tolist()
    if not (math.isfinite(loss_total) and math.isfinite(grad_norm)):
        # Before anything of this step is saved: a checkpoint of it would push out the last good ones.
        raise DivergedError(
            f"step {step + 1}: loss sum {loss_total}, gradient norm {grad_norm}; the last checkpoint is from before. "
            f"Lower optimizer.lr={config.optimizer.lr}, or look at the rows of this step"
        )
    if parts.spec.rank == 0:
        timing = {"step_s": time.perf_counter() - began, "data_s": data_s}
        lr = config.optimizer.lr * lr_scale
        link.send(StepDone(_row(parts, step + 1, batch, loss_total, lr, grad_norm, timing)))
    return bool(wishes)


def _row(
    parts: RankParts,
    step: int,
    batch: StepBatch,
    loss_sum: float,
    lr: float,
    grad_norm: float,
    timing: dict[str, float],
) -> dict[str, Any]:
    return {
        "step": step,
        "attempt": parts.spec.attempt.attempt,
        "world_size": parts.spec.world_size,
        "epoch": parts.loader.epoch(batch.position),
        "position": batch.position,
        "loss": loss_sum / batch.num_trained_tokens,
        "lr": lr,
        "grad_norm": grad_norm,
        "trained_tokens": batch.num_trained_tokens,
        "tokens": batch.num_tokens,
        "tokens_per_s": round(batch.num_tokens / timing["step_s"], 2),
        "step_s": round(timing["step_s"], 4),
        "data_s": round(timing["data_s"], 4),
        "digest": batch.digest,
    }


def _evaluate(parts: RankParts, link: Link, step: int) -> None:
    split = parts.eval_split
    if split is None:
        return
    link.send(PhaseChanged("evaluate", step))
    loss = evaluate_loss(parts.engine, split.open(), parts.layout, split.num_trained_tokens)
    if parts.spec.rank == 0:
        link.send(EvalDone({"step": step, "attempt": parts.spec.attempt.attempt, "eval_loss": loss}))
    link.send(PhaseChanged("step", step))


def _save(parts: RankParts, link: Link, step: int) -> None:
    """Writes this rank's slices. The checkpoint exists once the coordinator has all of them."""
    link.send(PhaseChanged("save", step))
    spec, engine = parts.spec, parts.engine
    name = f"checkpoints/{checkpoint_name(step, spec.attempt.attempt)}/{slices_name(spec.rank, spec.world_size)}"
    file = write_slices(LocalStore(Path(spec.attempt.run_dir)), name, collect_slices(engine, parts.names))
    probe = probe_logits(engine, parts.vocab_size)  # collective at stage 3
    details = _manifest_details(parts, step, probe) if spec.rank == 0 else None
    link.send(Staged(step, asdict(file), details))
    link.send(PhaseChanged("step", step))


def _manifest_details(parts: RankParts, step: int, probe: dict[str, Any]) -> dict[str, Any]:
    position = min(step * parts.config.train.global_batch_size, parts.spec.attempt.num_positions)
    return {
        "step": step,
        "cursor": asdict(Cursor(parts.loader.epoch(position), position)),
        "zero_stage": parts.config.zero_stage,
        "optimizer_step": optimizer_step(parts.engine),
        "fingerprint": asdict(parts.fingerprint),
        "groups": group_settings(parts.engine),
        "schedule": {**parts.config.schedule.model_dump(), "max_steps": parts.spec.attempt.max_steps},
        "params": [param.to_dict() for param in parts.params],
        "probe": probe,
        "environment": parts.environment,
    }


def _is_due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
