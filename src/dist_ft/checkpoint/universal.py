"""Writes a checkpoint as a universal checkpoint of DeepSpeed, with which a run goes on without dist-ft.

DeepSpeed reads it at any number of ranks (`checkpoint.load_universal`), at stages 1 to 3. It is made of files of
`torch.save`, because DeepSpeed reads nothing else; nothing here reads such a file. One tensor is in memory at a time.

    DIR/latest_universal                                            name of the folder
    DIR/global_step40/mp_rank_00_model_states.pt                    counters, for stages 1 and 2
    DIR/global_step40/zero_pp_rank_0_mp_rank_00_model_states.pt     the same, for stage 3
    DIR/global_step40/zero/optimizer_state.pt                       settings of the optimizer's groups
    DIR/global_step40/zero/NAME/{fp32,exp_avg,exp_avg_sq,step}.pt   of each trained parameter
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dist_ft.checkpoint.manifest import Manifest
from dist_ft.checkpoint.snapshot import SliceReader
from dist_ft.errors import UsageError
from dist_ft.slices import ADAM_STATE, STATE_KINDS, SliceKey
from dist_ft.storage.store import Store

_VERSION = 0.2
"""Of the format: plain tensors, without tensor parallelism."""


def write_universal(store: Store, manifest: Manifest, directory: Path) -> None:
    """Write a checkpoint for `engine.load_checkpoint(directory)` of DeepSpeed.

    Args:
        store: The run directory.
        manifest: The checkpoint.
        directory: An empty directory.

    Raises:
        UsageError: The optimizer is not AdamW, and DeepSpeed knows no other in such a checkpoint.
        CheckpointError: The slices do not hold a parameter.
    """
    if any(param.state != ADAM_STATE for param in manifest.params):
        raise UsageError(
            f"a universal checkpoint holds the state of AdamW, and this run's optimizer is "
            f"{manifest.fingerprint.optimizer}; `dist-ft export` without --format writes its weights"
        )
    tag = directory / f"global_step{manifest.step}"
    read = SliceReader(store, manifest)
    count = torch.tensor(float(manifest.optimizer_step))  # torch's AdamW counts in tensors
    for param in manifest.params:
        folder = tag / "zero" / param.name
        folder.mkdir(parents=True)
        for kind in STATE_KINDS:
            whole = read(SliceKey(param.name, 0, kind), param.numel).view(param.shape)
            torch.save({"param": whole}, folder / f"{kind}.pt")
        torch.save(count, folder / "step.pt")
    groups = [{key: _setting(key, value) for key, value in group.items()} for group in manifest.groups]
    version = manifest.environment.versions.get("deepspeed", "0.19.8")
    optimizer_state: dict[str, Any] = {
        "ds_version": version,
        "param_groups": groups,  # for stages 1 and 2
        "optimizer_state_dict": {"state": {0: {"step": count}}, "param_groups": groups},  # for stage 3
    }
    torch.save(optimizer_state, tag / "zero" / "optimizer_state.pt")
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        torch.save(_counters(manifest, version), tag / name)
    (directory / "latest_universal").write_text(tag.name)


def _setting(key: str, value: object) -> object:
    return tuple(value) if key == "betas" and isinstance(value, list) else value


def _counters(manifest: Manifest, version: str) -> dict[str, Any]:
    """Return what DeepSpeed's engine takes over besides the state; what it does not know is its client state."""
    step = manifest.step
    return {
        "module": {},  # not read: the weights come from `zero/`, frozen ones stay the base model's
        "ds_version": version,
        "dp_world_size": manifest.world_size,
        "mp_world_size": 1,
        "global_steps": step,
        "global_samples": step * manifest.fingerprint.global_batch_size,
        "skipped_steps": 0,
        # A scheduler of DeepSpeed counts from -1, one of torch from 0. Their shape is the new config's.
        "lr_scheduler": {"last_batch_iteration": step - 1, "last_epoch": step},
        "universal_checkpoint_info": {"universal_checkpoint_version": _VERSION},
        "dist_ft": {
            "step": step,
            "epoch": manifest.cursor.epoch,
            "position": manifest.cursor.position,
            "seed": manifest.fingerprint.seed,
            "global_batch_size": manifest.fingerprint.global_batch_size,
            "schedule": dict(manifest.schedule),
        },
    }
