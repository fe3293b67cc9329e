"""Does the work of commands that need no cluster: prepares data on all cores, and measures a model.

Imports no ray.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any

from dist_ft.config import Config
from dist_ft.evaluate.merge import EvalShare, Evaluation, merge
from dist_ft.evaluate.target import Target
from dist_ft.jobs.spec import ExportResult, ShardJob
from dist_ft.machine import has_gpu, num_cores
from dist_ft.orchestrate.workers.processes import ForkServer, run_task
from dist_ft.report.progress import ShardProgress


def make_shards_here(config: Config, jobs: Sequence[ShardJob], show: Callable[[str], None]) -> None:
    """Make token shards, one at a time on each core.

    Args:
        config: A checked config.
        jobs: The shards.
        show: Receives the line of progress.

    Raises:
        UserError: A shard cannot be made; the message says why.
    """
    progress = ShardProgress(len(jobs), sum(job.num_bytes for job in jobs), time.monotonic())
    values = config.model_dump(mode="json")
    server = ForkServer()
    pool = ThreadPoolExecutor(num_cores())
    running: dict[Future[dict[str, Any]], int] = {}
    for job in jobs:
        task = job.task(values)
        running[pool.submit(run_task, server.socket_path, task.name, task.arguments)] = job.num_bytes
    try:
        for future in as_completed(running):
            progress.add(running[future], future.result()["num_rows"])
            show(progress.line(time.monotonic()))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        server.close()


def measure(address: str, target: Target) -> Evaluation:
    """Measure the metrics of the config and the held-out loss of a target.

    Args:
        address: Path or URL of the run, if the target is a checkpoint of a run.
        target: The models to measure.

    Raises:
        DistFtError: The target cannot be measured; the class and the message say why.
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
