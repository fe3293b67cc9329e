"""Manifests of checkpoints that need no ranks: what a test does not name has some value."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dist_ft.checkpoint.manifest import Manifest
from dist_ft.slices import Cursor, Environment, Fingerprint, ParamInfo, Probe, SavedState

MARK = Fingerprint("model-hash", "data-hash", 0, "kind=full", 8)


def saved_state(step: int, params: tuple[ParamInfo, ...] = (), **changes: Any) -> SavedState:
    """Returns what rank 0 says of a state after `step` steps of 8 sequences."""
    whole = SavedState(
        step=step,
        cursor=Cursor(0, 8 * step),
        zero_stage=2,
        optimizer_step=step,
        fingerprint=MARK,
        params=params,
        groups=(),
        schedule={"kind": "cosine", "max_steps": 60},
        probe=Probe((1,), (0,), ((0.5,),)),
        environment=Environment({}, 2, 1, "x86_64", "cpu"),
    )
    return replace(whole, **changes)


def make_manifest(step: int, attempt: int = 1, params: tuple[ParamInfo, ...] = (), **changes: Any) -> Manifest:
    """Returns a manifest of run `run` at a step of an attempt."""
    state = vars(saved_state(step, params))
    whole = Manifest(run_id="run", attempt=attempt, world_size=2, files=(), wandb_id=None, **state)
    return replace(whole, **changes)
