"""What ranks do in tests; run by `tests.helpers.ranks`. Arguments and results are JSON."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy

from dist_ft.checkpoint.manifest import Manifest
from dist_ft.checkpoint.snapshot import HostCopies, SliceReader, write_slices
from dist_ft.config import config_from_dict
from dist_ft.data.stream.cache import open_split
from dist_ft.evaluate.held_out import HeldOutSet, evaluate
from dist_ft.jobs import prepare as prepare_task
from dist_ft.jobs import score
from dist_ft.jobs.spec import Preparation, decode_preparation
from dist_ft.layout import RunDir, slices_name
from dist_ft.messages import (
    EvalDone,
    IntervalMeasured,
    Message,
    SaveFailed,
    SaveSkipped,
    SaveStreamed,
    Staged,
    StepDone,
)
from dist_ft.model.base import load_model
from dist_ft.objectives import kinds
from dist_ft.objectives.objective import Objective, Outputs, Rows
from dist_ft.objectives.sft import SFT
from dist_ft.run.attempt_spec import AttemptSpec, RankSpec
from dist_ft.slices import SliceKey
from dist_ft.storage.store import LocalStore
from dist_ft.train import build, saving
from dist_ft.train.build import RankParts, build_rank
from dist_ft.train.loop import run_loop
from dist_ft.zero.partitions import collect_slices, fragments, group_settings, optimizer_step, restore_slices

_STEPS_OF_A_SLOW_SAVE = 3


class Notes:
    """A link that keeps what the rank says; whoever started the ranks commits.

    Args:
        stop_after: Ask for a stop after this many steps.
    """

    def __init__(self, stop_after: int | None = None) -> None:
        self._stop_after = stop_after
        self._num_asked = 0
        self.rows: list[dict[str, Any]] = []
        self.evals: list[dict[str, Any]] = []
        self.staged: list[dict[str, Any]] = []
        self.skipped_saves: list[int] = []
        self.failed_saves: list[int] = []
        self.streamed_saves: list[int] = []
        self.intervals: list[dict[str, Any]] = []

    def send(self, message: Message) -> None:
        """See `train.link.Link`."""
        if isinstance(message, StepDone):
            self.rows.append(message.row.to_dict())
        elif isinstance(message, EvalDone):
            self.evals.append(message.row.to_dict())
        elif isinstance(message, SaveSkipped):
            self.skipped_saves.append(message.step)
        elif isinstance(message, SaveStreamed):
            self.streamed_saves.append(message.step)
        elif isinstance(message, IntervalMeasured):
            self.intervals.append(asdict(message))
        elif isinstance(message, SaveFailed):
            self.failed_saves.append(message.step)
        elif isinstance(message, Staged):
            self.staged.append(asdict(message))

    def should_stop(self) -> bool:
        """See `train.link.Link`; asked once a step."""
        self._num_asked += 1
        return self._stop_after is not None and self._num_asked >= self._stop_after

    def wait_committed(self, step: int) -> None:
        """See `train.link.Link`."""


def prepare(rank: int, world_size: int, config: dict[str, Any]) -> dict[str, Any]:
    """Runs the preparation and scores what a frozen model must have said before the first step; needs no group."""
    prepared = prepare_task.run(config_from_dict(config))
    found = decode_preparation(prepared)
    assert isinstance(found, Preparation)
    for job in found.to_score:
        task = job.task(config)
        score.run(**{**task.arguments, "config": config_from_dict(config)})
    return prepared


def train(rank: int, world_size: int, attempt: dict[str, Any], stop_after: int | None = None) -> dict[str, Any]:
    """Trains to the end or to a stop."""
    return _train(build_rank(_spec(rank, world_size, attempt)), stop_after)


def train_on_a_slow_disk(rank: int, world_size: int, attempt: dict[str, Any], slow_rank: int) -> dict[str, Any]:
    """Trains to the end; the first save of one rank is not written before two more steps are done."""
    parts = build_rank(_spec(rank, world_size, attempt))
    steps_done = threading.Semaphore(0)
    step = parts.loader.step

    def counted(index: int) -> Any:
        steps_done.release()  # at the begin of the next one
        return step(index)

    def slow(store: Any, name: str, slices: Any) -> Any:
        if rank == slow_rank and not waited:
            waited.append(name)
            for _ in range(_STEPS_OF_A_SLOW_SAVE):
                assert steps_done.acquire(timeout=60), "training waits for the disk"
        return write_slices(store, name, slices)

    waited: list[str] = []
    with mock.patch.object(parts.loader, "step", counted), mock.patch.object(saving, "write_slices", slow):
        return _train(parts, None)


def train_with_late_copies(rank: int, world_size: int, attempt: dict[str, Any]) -> dict[str, Any]:
    """Trains to the end; each copy of a save begins when the next update waits for it, and not before."""
    parts = build_rank(_spec(rank, world_size, attempt))
    is_awaited = threading.Event()
    copy, wait = HostCopies.copy, saving.Saver.wait_copied

    def late(copies: HostCopies, slices: Any) -> Any:
        assert is_awaited.wait(timeout=60), "no update waits for the copy"
        is_awaited.clear()
        return copy(copies, slices)

    def waiting(saver: saving.Saver) -> None:
        if not saver._is_copied.is_set():
            is_awaited.set()
        wait(saver)

    with mock.patch.object(HostCopies, "copy", late), mock.patch.object(saving.Saver, "wait_copied", waiting):
        return _train(parts, None)


def train_on_a_broken_disk(rank: int, world_size: int, attempt: dict[str, Any], failure: str) -> dict[str, Any]:
    """Trains; the first save of rank 1 fails."""
    parts = build_rank(_spec(rank, world_size, attempt))
    failed: list[str] = []

    def broken(store: Any, name: str, slices: Any) -> Any:
        if rank == 1 and not failed:
            failed.append(name)
            raise {"disk": OSError(28, "No space left on device"), "bug": RuntimeError("nobody foresaw")}[failure]
        return write_slices(store, name, slices)

    with mock.patch.object(saving, "write_slices", broken):
        return _train(parts, None)


def train_without_memory(rank: int, world_size: int, attempt: dict[str, Any]) -> dict[str, Any]:
    """Trains to the end; rank 1 has no memory for copies of its slices."""
    parts = build_rank(_spec(rank, world_size, attempt))
    with mock.patch.object(saving, "available_memory_bytes", lambda: 1 if rank == 1 else None):
        return _train(parts, None)


def train_and_look(rank: int, world_size: int, attempt: dict[str, Any]) -> dict[str, Any]:
    """Trains to the end and says which frozen parameters are not the base's any more."""
    parts = build_rank(_spec(rank, world_size, attempt))
    return {**_train(parts, None), **_compare_frozen(parts)}


def train_and_gather(rank: int, world_size: int, attempt: dict[str, Any], to: str) -> dict[str, Any]:
    """Trains to the end; rank 0 writes the weights as gathered, and as DeepSpeed's own tools give them."""
    parts = build_rank(_spec(rank, world_size, attempt))
    result = _train(parts, None)
    stage = parts.config.zero_stage
    with _whole(parts, list(parts.engine.names)):
        gathered = {name: p.detach().float().clone() for p, name in parts.engine.names.items()}
    found = {"gathered": gathered}
    if stage > 0:
        found["masters"] = {name: safe_get_full_fp32_param(p).clone() for p, name in parts.engine.names.items()}
    if stage > 0 and parts.config.model.torch_dtype == "float32":  # its tools do not read BF16_Optimizer's files
        parts.engine.raw.save_checkpoint(f"{to}/native", tag="end")
        dist.barrier()
        if rank == 0:
            native = get_fp32_state_dict_from_zero_checkpoint(f"{to}/native", tag="end")
            # The engine's module is ObjectiveModule, which holds the model as `model`.
            found["native"] = {k.removeprefix("model."): v.clone().contiguous() for k, v in native.items()}
    if rank == 0:
        for kind, tensors in found.items():
            save_file(tensors, f"{to}/{kind}.safetensors")
    return result


def restore(rank: int, world_size: int, attempt: dict[str, Any], write_as: int) -> dict[str, Any]:
    """Builds a rank from a checkpoint, looks at what it holds, and writes it as attempt `write_as`."""
    readers: list[SliceReader] = []
    with mock.patch.object(build, "SliceReader", _recorder(readers)):
        parts = build_rank(_spec(rank, world_size, attempt))
    return {
        "step": parts.start_step,
        "optimizer_step": optimizer_step(parts.engine),
        "groups": group_settings(parts.engine),
        "bytes_read": sum(reader.bytes_read for reader in readers),
        "stale_weights": _stale_weights(parts),
        "eval_loss": _eval_loss(parts),
        "file": _write(parts, parts.start_step, write_as),
    }


def go_on_from_each(
    rank: int, world_size: int, attempt: dict[str, Any], checkpoints: list[str], write_as: int
) -> list[dict[str, Any]]:
    """Restores one checkpoint after the other, and from each trains one step.

    The first goes into a fresh engine; the state is made unusable before each of the others. What was restored
    is written as attempt `write_as`, what the step made of it as `write_as + 1`, and so on.
    """
    parts = build_rank(_spec(rank, world_size, {**attempt, "start_checkpoint": checkpoints[0]}))
    results = []
    for index, path in enumerate(checkpoints):
        if index > 0:
            _spoil(parts)
            reader, manifest = _open(parts, path)
            restore_slices(parts.engine, reader, manifest.optimizer_step, manifest.optimizer_numbers)
        number = write_as + 2 * index
        file = _write(parts, parts.start_step, number)
        spec = parts.spec
        parts.spec = replace(spec, attempt=replace(spec.attempt, attempt=number + 1))
        results.append({"file": file, **_train(parts, stop_after=1)})
    return results


def _spec(rank: int, world_size: int, attempt: dict[str, Any]) -> RankSpec:
    return RankSpec(AttemptSpec.from_dict(attempt), rank, world_size, rank, "127.0.0.1", num_threads=1)


def _train(parts: RankParts, stop_after: int | None) -> dict[str, Any]:
    notes = Notes(stop_after)
    outcome, step = run_loop(parts, notes)
    return {
        "outcome": outcome, "step": step, "rows": notes.rows, "evals": notes.evals, "staged": notes.staged,
        "skipped_saves": notes.skipped_saves, "failed_saves": notes.failed_saves,
        "streamed_saves": notes.streamed_saves, "intervals": notes.intervals,
    }  # fmt: skip


def _write(parts: RankParts, step: int, attempt: int) -> dict[str, Any]:
    spec = parts.spec
    directory = RunDir(Path(spec.attempt.run_dir)).checkpoint(step, attempt)
    slices = collect_slices(parts.engine)
    return asdict(write_slices(LocalStore(directory), slices_name(spec.rank, spec.world_size), slices))


def _open(parts: RankParts, path: str) -> tuple[SliceReader, Manifest]:
    store = LocalStore(Path(parts.spec.attempt.run_dir))
    manifest = Manifest.decode(store.read(path))
    return SliceReader(store, manifest), manifest


def _recorder(readers: list[SliceReader]) -> type[SliceReader]:
    class Recorder(SliceReader):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            readers.append(self)

    return Recorder


def _spoil(parts: RankParts) -> None:
    """Fills masters and moments with what a restore must replace."""
    engine = parts.engine
    with torch.no_grad():
        for fragment in fragments(engine, owned=False):
            for kind in ("fp32", *engine.optimizer.state):
                fragment.view(kind, engine.inner.state).fill_(float("nan"))


@contextmanager
def _whole(parts: RankParts, parameters: list[Any]) -> Iterator[None]:
    """Makes parameters whole on every rank; at stage 3 they are cut."""
    if parts.config.zero_stage < 3:
        yield
        return
    with deepspeed.zero.GatheredParameters(parameters):
        yield


def _stale_weights(parts: RankParts) -> list[str]:
    """Names of parameters that compute with something else than the checkpoint's rounded masters."""
    path = parts.spec.attempt.start_checkpoint
    assert path is not None
    reader, _ = _open(parts, path)
    stale = []
    with _whole(parts, list(parts.engine.names)):
        for parameter, name in parts.engine.names.items():
            wanted = reader(SliceKey(name, 0, "fp32"), parameter.numel()).to(parameter.dtype)
            if not torch.equal(parameter.detach().view(-1), wanted):
                stale.append(name)
    return stale


def _eval_loss(parts: RankParts) -> float | None:
    if not parts.eval_sets:
        return None
    sets = {
        name: HeldOutSet(open_split(split, parts.config.data.loader), parts.objective.weight(split.totals))
        for name, split in parts.eval_sets.items()
    }
    return evaluate(parts.engine, parts.objective, sets, parts.layout, parts.engine.device)["eval_loss"]


def _compare_frozen(parts: RankParts) -> dict[str, Any]:
    base = dict(load_model(parts.config).named_parameters())
    model = parts.engine.module.model
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    changed = []
    with _whole(parts, list(frozen.values())):
        for name, parameter in frozen.items():
            plain = name.removeprefix("base_model.model.")
            for part in (".base_layer", ".original_module"):
                plain = plain.replace(part, "")
            if not torch.equal(parameter.detach(), base[plain]):
                changed.append(name)
    return {"frozen": sorted(frozen), "changed": changed}


def _token_losses(outputs: Outputs, rows: Rows) -> torch.Tensor:
    return cross_entropy(outputs.logits_NV, outputs.targets_N, reduction="sum").reshape(1)


def _loss_with_step_mean(outputs: Outputs, rows: Rows) -> torch.Tensor:
    loss_sum = _token_losses(outputs, rows) * (1 + rows.step_mean)
    num_slots = (rows.slots_B >= 0).sum()
    return torch.stack([loss_sum[0], rows.step_mean * num_slots, num_slots.float()])


OTHER_OBJECTIVES = {
    # What SFT does not use: a number of the step, metrics of every step, slots as the divisor.
    "step_sum": Objective(
        kind="sft",
        render=SFT.render,
        weight=lambda totals: totals.num_slots,
        loss=_loss_with_step_mean,
        metrics=("step_mean", "one"),
        step_sum=_token_losses,
    ),
}


def prepare_for(rank: int, world_size: int, config: dict[str, Any], objective: str) -> dict[str, Any]:
    """Runs the preparation for one of `OTHER_OBJECTIVES`."""
    with mock.patch.object(kinds, "SFT", OTHER_OBJECTIVES[objective]):
        return prepare(rank, world_size, config)


def train_by(rank: int, world_size: int, attempt: dict[str, Any], objective: str) -> dict[str, Any]:
    """Trains to the end by one of `OTHER_OBJECTIVES`."""
    with mock.patch.object(kinds, "SFT", OTHER_OBJECTIVES[objective]):
        return _train(build_rank(_spec(rank, world_size, attempt)), None)
