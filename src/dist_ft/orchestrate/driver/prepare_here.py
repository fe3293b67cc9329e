"""Prepares data on this machine alone, on all its cores, for the commands that need no cluster."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any

from dist_ft.config import Config
from dist_ft.jobs.spec import ShardJob
from dist_ft.machine import num_cores
from dist_ft.orchestrate.workers.processes import ForkServer, run_task
from dist_ft.report.progress import ShardProgress


def make_shards_here(config: Config, jobs: Sequence[ShardJob], show: Callable[[str], None]) -> None:
    """Makes token shards, one at a time on each core.

    Args:
        config: A checked config.
        jobs: The shards.
        show: Takes the line of progress.

    Raises:
        UserError: Of the kind that says what is wrong.
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
