#!/usr/bin/env python3
"""1,000 simulated workers report to one coordinator actor of Ray once a second: lag, losses, memory.

    python benchmarks/control_plane.py [--workers 1000] [--seconds 60] [--json FILE]

The coordinator is the real actor, held to one core, with a run directory, metrics and ledger on the disk, without
sinks. The workers are simulated by one process on the other cores, which makes the calls that a supervisor makes,
spread evenly over the second: each says which step it is in (a heartbeat is less), rank 0 also sends the row of the
step with the seconds of all ranks, and the driver polls four times a second. 1,000 a second is what supervisors of
1,000 workers send (`_HEARTBEATS_PER_S` in orchestrate/workers/supervisor.py).

*Lag* is the time from the moment at which a report was due until its answer is back, so a generator that falls behind
counts as lag. *Nothing lost* means: every report has an answer, and metrics.jsonl has the row of every second.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import ray

from dist_ft.config import config_from_dict
from dist_ft.coordinator.actor import CoordinatorActor
from dist_ft.messages import Envelope, Message, Phase, PhaseChanged, StepDone
from dist_ft.metric_rows import StepRow
from dist_ft.run.place import open_run
from dist_ft.run.run_inputs import RunInputs
from dist_ft.run.state import RunRecord
from dist_ft.slices import Fingerprint

_POLLS_PER_S = 4
_NAME = "control"


def row_of(step: int, attempt: int, num_workers: int) -> StepRow:
    """Return a row of metrics."""
    return StepRow(
        step, attempt, world_size=num_workers, epoch=0, position=step, loss=1.0, lr=1.0, grad_norm=1.0,
        trained_tokens=1, tokens=1, tokens_per_s=1.0, step_s=1.0, data_s=0.0, digest="0" * 16, goodput=None, metrics={},
    )  # fmt: skip


def start_run(directory: Path, num_workers: int, seconds: int) -> tuple[Any, int]:
    """Start the coordinator and open an attempt; return what asks it, and the attempt's number."""
    config = config_from_dict(
        {
            "run": {"name": _NAME, "output_dir": str(directory)},
            "model": {"name": "tiny-random"},
            "data": {"train": [{"source": "embedded:orders/train"}]},
            "train": {"global_batch_size": num_workers, "max_steps": seconds},
            "monitor": {"wandb": "disabled", "report_every_s": None},
        }
    )
    place = open_run(config.run.address)
    place.path.mkdir(parents=True)
    secret = secrets.token_hex(32)
    remote_class: Any = CoordinatorActor
    actor = remote_class.remote(secret)
    inputs = RunInputs((), None, Fingerprint("m", "d", 0, "kind=full", num_workers), seconds, seconds * num_workers)
    record = RunRecord(_NAME, max_steps=seconds)
    ray.get(actor.ask.remote(secret, "begin", config, place.address, str(place.path), record, inputs, False))
    attempt = None
    while attempt is None:
        attempt = ray.get(actor.ask.remote(secret, "open_attempt", num_workers))
        time.sleep(0.05)

    def ask(call: str, *arguments: Any) -> Any:
        return actor.ask.remote(secret, call, *arguments)

    return ask, attempt


def find_actor() -> psutil.Process:
    """Return the process of the coordinator."""
    for process in psutil.Process().children(recursive=True):
        if "CoordinatorActor" in " ".join(process.cmdline()):
            return process
    raise SystemExit("the coordinator's process was not found")


async def report(ask: Any, attempt: int, num_workers: int, seconds: int) -> tuple[list[float], list[float]]:
    """Send all reports when they are due; return the lags of reports and of polls."""
    lags: list[float] = []
    poll_lags: list[float] = []
    running: set[asyncio.Task[None]] = set()
    began = time.monotonic() + 0.5

    async def send(due: float, kept: list[float], call: str, *arguments: Any) -> None:
        await ask(call, *arguments)
        kept.append(time.monotonic() - due)

    def start(due: float, kept: list[float], call: str, *arguments: Any) -> None:
        task = asyncio.create_task(send(due, kept, call, *arguments))
        running.add(task)
        task.add_done_callback(running.discard)

    def tell(due: float, rank: int, message: Message) -> None:
        start(due, lags, "handle", Envelope(_NAME, attempt, rank, message).to_dict())

    for second in range(seconds):
        for rank in range(num_workers):
            due = began + second + rank / num_workers
            if (ahead := due - time.monotonic()) > 0:
                await asyncio.sleep(ahead)
            tell(due, rank, PhaseChanged(Phase.STEP, second + 1))
            if rank == 0:
                tell(due, 0, StepDone(row_of(second + 1, attempt, num_workers), [1.0] * num_workers))
            if rank % (num_workers // _POLLS_PER_S) == 0:
                start(due, poll_lags, "poll", 0)
    while running:
        await asyncio.wait(running)
    return lags, poll_lags


def percentile(values: list[float], share: float) -> float:
    """Return the value below which a share of the values lies."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def main() -> None:
    """Run the trial and print a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--json", type=Path, help="also write the result here")
    options = parser.parse_args()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    with tempfile.TemporaryDirectory(prefix="dist-ft-control-") as name:
        ask, attempt = start_run(Path(name), options.workers, options.seconds)
        actor = find_actor()
        cores = psutil.Process().cpu_affinity()
        actor.cpu_affinity(cores[:1])
        before, used = actor.memory_info().rss, sum(actor.cpu_times()[:2])
        lags, poll_lags = asyncio.run(report(ask, attempt, options.workers, options.seconds))
        status = ray.get(ask("poll", 0))
        rows = (Path(name) / _NAME / "metrics.jsonl").read_text().splitlines()
        num_reports = options.seconds * (options.workers + 1)
        result = {
            "workers": options.workers,
            "seconds": options.seconds,
            "reports": num_reports,
            "answered": len(lags),
            "rows": len({json.loads(row)["step"] for row in rows}),
            "phases": [str(phase) for phase in status.phases],
            "lag_ms": {
                **{f"p{round(100 * share)}": round(1e3 * percentile(lags, share), 1) for share in (0.5, 0.9, 0.99)},
                "max": round(1e3 * max(lags), 1),
            },
            "poll_lag_p99_ms": round(1e3 * percentile(poll_lags, 0.99), 1),
            "share_of_a_core": round((sum(actor.cpu_times()[:2]) - used) / options.seconds, 2),
            "memory_mib": {"before": round(before / 2**20), "after": round(actor.memory_info().rss / 2**20)},
            "load": [round(value, 1) for value in os.getloadavg()],
        }
    ray.shutdown()
    print(json.dumps(result))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
