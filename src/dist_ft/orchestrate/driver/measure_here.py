"""Measures a run, a model or an adapter on this machine, without a cluster. Imports no ray."""

from __future__ import annotations

import tempfile

from dist_ft.evaluate.merge import EvalShare, Evaluation, merge
from dist_ft.jobs.spec import ExportResult
from dist_ft.jobs.target import Target
from dist_ft.machine import has_gpu
from dist_ft.orchestrate.workers.processes import ForkServer, run_task


def measure(address: str, target: Target) -> Evaluation:
    """Measures a target with the metrics of its config, and by its held-out loss.

    Args:
        address: Path or URL of the run, if the target is a checkpoint of one.
        target: What to measure.

    Raises:
        DistFtError: Of the kind that says what is wrong.
    """
    config = target.config.model_dump(mode="json")
    server = ForkServer(on_gpu=has_gpu())
    try:
        with tempfile.TemporaryDirectory(prefix="dist-ft-eval-") as scratch:
            models = dict(target.models)
            if target.checkpoint is not None:
                to = f"{scratch}/export"
                arguments = {"config": config, "run_dir": address, "checkpoint": target.checkpoint, "to": to}
                exported = ExportResult(**run_task(server.socket_path, "export", arguments))
                models["tuned"] = exported.export_dir
            asked = {"config": config, "models": models, "with_loss": True}
            found = EvalShare.from_dict(run_task(server.socket_path, "evaluate", asked))
    finally:
        server.close()
    return merge(target.config.eval, models, [found])
