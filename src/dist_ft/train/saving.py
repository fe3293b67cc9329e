"""Saves a rank's part of a checkpoint: it copies beside the next forward pass and writes while training goes on.

Masters and optimizer state change in the update only, so the copy may take until then (`wait_copied`).

At most one save is in flight. The sum that every step makes tells all ranks whether any of them is still saving, so all
ranks leave out the same saves. The checkpoint exists once the coordinator has heard of every rank's file.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence

import torch

from dist_ft.checkpoint.snapshot import HostCopies, write_slices
from dist_ft.errors import WorkerCrashError
from dist_ft.evaluate.held_out import probe_logits
from dist_ft.layout import checkpoint_name, slices_name
from dist_ft.machine import available_memory_bytes
from dist_ft.messages import Phase, PhaseChanged, SaveFailed, SaveStreamed, Staged
from dist_ft.slices import Cursor, Probe, SavedState, SliceKey
from dist_ft.storage.objects import open_store
from dist_ft.train.build import RankParts
from dist_ft.train.link import Link
from dist_ft.zero.partitions import collect_slices, group_settings, optimizer_numbers, optimizer_step

logger = logging.getLogger(__name__)

_SHARE_OF_FREE = 0.8
"""Most of the free memory that copies may take: the step that goes on beside them needs some, too."""

Slices = Sequence[tuple[SliceKey, torch.Tensor]]


class Saver:
    """Saves the state of one rank.

    Args:
        parts: The rank.
        link: Where it says what it has written.
    """

    def __init__(self, parts: RankParts, link: Link) -> None:
        self._parts = parts
        self._link = link
        self._store = open_store(parts.spec.attempt.run_dir)
        self._copies = HostCopies()
        self._has_probed = False
        self._thread: threading.Thread | None = None
        self._is_copied = threading.Event()
        self._is_copied.set()
        self._blocked_s = 0.0
        self._error: tuple[int, BaseException] | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a save is still being written."""
        return self._thread is not None and self._thread.is_alive()

    def save(self, step: int, is_last: bool = False) -> None:
        """Save the state after `step`. Collective at stage 3.

        Returns before the copy is made, or blocks until it is written: with `checkpoint.in_background=false`, for the
        last one, and where the node has no memory for copies. The probe is a forward pass, which takes longer than the
        copy of an adapter, so only the first save and the last have one; `jobs.export` computes it for the others.
        A disk that is full ends nothing: the run goes on without this checkpoint, and the coordinator counts.
        """
        began = time.perf_counter()
        self._link.send(PhaseChanged(Phase.SAVE, step))
        has_probe = is_last or not self._has_probed
        probe = probe_logits(self._parts.engine, self._parts.vocab_size) if has_probe else None
        self._has_probed = True
        state = self._state(step, probe) if self._parts.spec.rank == 0 else None
        slices: Slices = [*collect_slices(self._parts.engine)]  # views; nothing is copied yet
        if is_last:
            self._link.send(PhaseChanged(Phase.DRAIN, step))  # the limit of a save may be one of copies
        is_beside = not is_last and self._parts.config.checkpoint.in_background and self._has_room(step, slices)
        self.finish()
        if not is_beside:
            self._write(step, slices, state, is_last, began)
        else:
            self._is_copied.clear()
            arguments = (step, slices, state, began)
            self._thread = threading.Thread(target=self._copy_and_write, args=arguments, name="save", daemon=True)
            self._blocked_s = time.perf_counter() - began
            self._thread.start()
        logger.info("saving step %d held the rank up for %.3f s", step, time.perf_counter() - began)
        if not is_last:
            self._link.send(PhaseChanged(Phase.STEP, step))

    def wait_copied(self) -> None:
        """Wait until the save in flight has copied the state. The loop calls it before each update."""
        if not self._is_copied.is_set():
            began = time.perf_counter()
            self._is_copied.wait()
            self._blocked_s += time.perf_counter() - began

    def finish(self) -> None:
        """Wait for the save in flight and raise its error, if any."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raise the unforeseen error of a save, if any. The loop calls it before each step.

        Raises:
            WorkerCrashError: The writer failed; the message has the step of the checkpoint and the cause.
        """
        if self._error is not None:
            step, error = self._error
            raise WorkerCrashError(
                f"the checkpoint of step {step} could not be written: {type(error).__name__}: {error}"
            ) from error

    def _has_room(self, step: int, slices: Slices) -> bool:
        """Return whether the copies of all ranks of this node fit into its memory; else say so."""
        needed = self._copies.num_new_bytes(slices) * self._parts.spec.local_world_size
        free = available_memory_bytes()
        if free is None or needed <= _SHARE_OF_FREE * free:
            return True
        self._link.send(SaveStreamed(step, needed, free))
        return False

    def _copy_and_write(self, step: int, slices: Slices, state: SavedState | None, began: float) -> None:
        try:
            try:
                copies = self._copies.copy(slices)
            finally:
                self._is_copied.set()
            self._write(step, copies, state, False, began)
        except BaseException as error:
            self._error = step, error  # the loop raises it

    def _write(self, step: int, slices: Slices, state: SavedState | None, is_last: bool, began: float) -> None:
        spec = self._parts.spec
        name = f"checkpoints/{checkpoint_name(step, spec.attempt.attempt)}/{slices_name(spec.rank, spec.world_size)}"
        try:
            file = write_slices(self._store, name, slices)
            written_s = time.perf_counter() - began
            blocked_s = self._blocked_s if threading.current_thread() is self._thread else written_s
            self._link.send(Staged(step, file, state, is_last, round(blocked_s, 4), round(written_s, 4)))
        except OSError as error:
            logger.exception("step %d could not be saved", step)
            self._link.send(SaveFailed(step, f"{type(error).__name__}: {error}", is_last))

    def _state(self, step: int, probe: Probe | None) -> SavedState:
        """Return what the manifest says besides the files."""
        parts = self._parts
        position = min(step * parts.config.train.global_batch_size, parts.spec.attempt.inputs.num_positions)
        return SavedState(
            step=step,
            cursor=Cursor(parts.loader.epoch(position), position),
            zero_stage=parts.config.zero_stage,
            optimizer_step=optimizer_step(parts.engine),
            optimizer_numbers=optimizer_numbers(parts.engine),
            fingerprint=parts.fingerprint,
            params=tuple(parts.params),
            groups=tuple(group_settings(parts.engine)),
            schedule={**parts.config.schedule.model_dump(), "max_steps": parts.spec.attempt.inputs.max_steps},
            probe=probe,
            environment=parts.environment,
        )
