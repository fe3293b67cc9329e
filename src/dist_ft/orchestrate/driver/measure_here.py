"""Measures a run, a model or an adapter on this machine, without a cluster. Imports no ray."""

from __future__ import annotations

import tempfile
from typing import Any

from dist_ft.evaluate.merge import merge
from dist_ft.jobs.target import Target
from dist_ft.machine import has_gpu
from dist_ft.orchestrate.workers.processes import ForkServer, run_task


def measure(address: str, target: Target) -> dict[str, Any]:
    """Returns `{"models": {name: {metric: value}}, "num_rows", "samples", "eval_s"}`.

    Args:
        address: Path or URL of the run, if the target is a checkpoint of one.
        target: What to measure.

    Raises:
        DistFtError: Of the kind that says what is wrong.
    """
    server = ForkServer(on_gpu=has_gpu())
    try:
        with tempfile.TemporaryDirectory(prefix="dist-ft-eval-") as scratch:
            models = dict(target.models)
            if target.checkpoint is not None:
                models["tuned"] = _export(server, address, target, f"{scratch}/export")
            arguments = {"config": target.config.model_dump(mode="json"), "models": models, "with_loss": True}
            found = run_task(server.socket_path, "evaluate", arguments)
    finally:
        server.close()
    merged = merge(target.config.eval, list(models), [found])
    scores = {name: {**found["numbers"][name], **merged.pop(name)} for name in models}
    return {"models": scores, **merged}


def _export(server: ForkServer, address: str, target: Target, to: str) -> str:
    config = target.config.model_dump(mode="json")
    arguments = {"config": config, "run_dir": address, "checkpoint": target.checkpoint, "to": to}
    return str(run_task(server.socket_path, "export", arguments)["export_dir"])
