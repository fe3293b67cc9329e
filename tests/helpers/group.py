"""Runs real ranks under real supervision without Ray: forked processes, a plain coordinator, threads.

What differs from production is only who calls `supervise`: a thread here, a Ray worker there.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from dist_ft.config import Config
from dist_ft.coordinator.core import Coordinator
from dist_ft.messages import Envelope, Reply
from dist_ft.orchestrate.workers.processes import run_task
from dist_ft.orchestrate.workers.supervisor import RankSlot, supervise
from dist_ft.run.place import RECORDS, Run, open_run
from dist_ft.run.run_inputs import RunInputs
from dist_ft.run.state import RunRecord
from dist_ft.storage.publish import read_json
from tests.helpers.rows import last_rows


@dataclass
class Group:
    """One attempt of a run.

    Attributes:
        run_dir: The run directory.
        coordinator: Its coordinator, finished.
        outcome: completed, stopped or failed.
        errors: What each supervisor raised.
        ended_at: When each supervisor ended, in monotonic seconds.
    """

    run_dir: Run
    coordinator: Coordinator
    outcome: str = ""
    errors: dict[int, BaseException] = field(default_factory=dict)
    ended_at: dict[int, float] = field(default_factory=dict)

    @property
    def losses(self) -> dict[int, float]:
        """Loss of each step over all attempts."""
        return {step: row["loss"] for step, row in last_rows(self.run_dir.metrics).items()}

    @property
    def digests(self) -> dict[int, str]:
        """Sequence digest of each step over all attempts."""
        return {step: row["digest"] for step, row in last_rows(self.run_dir.metrics).items()}


class _Direct:
    """A coordinator client without Ray. `on_message` may act on what passes (stop, kill)."""

    def __init__(self, coordinator: Coordinator, on_message: Any) -> None:
        self._coordinator = coordinator
        self._lock = threading.RLock()
        self._on_message = on_message

    def handle(self, envelope: Envelope) -> Reply:
        with self._lock:
            reply = self._coordinator.handle(envelope, time.monotonic())
            if self._on_message is not None:
                self._on_message(self._coordinator, envelope.to_dict())
            return reply


def stop_early(coordinator: Coordinator, envelope: dict[str, Any]) -> None:
    """Asks for a stop before there is a step: ranks do not wait for answers, and could end before a later request."""
    if envelope["kind"] == "rank_started":
        coordinator.request_stop("test")


def run_group(config: Config, starter: str, on_message: Any = None, on_gpu: bool = False) -> Group:
    """Prepares, runs one attempt at `cluster.num_workers`, and closes the books."""
    run_dir = open_run(config.run.address)
    run_dir.fetch(*RECORDS)
    prepared = RunInputs.from_dict(run_task(starter, "prepare", {"config": config.model_dump(mode="json")}))
    attempt = read_json(run_dir.run_json)["attempt"] if run_dir.run_json.exists() else 0
    record = RunRecord(config.run.name, attempt=attempt, max_steps=prepared.max_steps)
    coordinator = Coordinator(config, run_dir, record, prepared, on_gpu=on_gpu)
    size = config.cluster.max_workers
    spec = coordinator.open_attempt(size, time.monotonic())
    client = _Direct(coordinator, on_message)
    group = Group(run_dir, coordinator)

    def work(rank: int) -> None:
        try:
            # As many ranks "on the node" as cores, so that each computes on one thread, as in CI.
            gpu_ids = (str(rank % torch.cuda.device_count()),) if on_gpu else ()
            supervise(spec, RankSlot(rank, size, rank, max(size, 2), "127.0.0.1", gpu_ids), client, starter)
        except BaseException as error:
            group.errors[rank] = error
        group.ended_at[rank] = time.monotonic()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
    assert not any(thread.is_alive() for thread in threads), "a supervisor hangs"
    group.outcome = coordinator.outcome() or "failed"
    coordinator.finish(group.outcome, {})
    return group
