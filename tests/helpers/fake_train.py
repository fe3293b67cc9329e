"""Stands in for `dist-ft train`: leaves the files of a run within a moment, so that the service can be tested alone.

A seed of 13 waits at half of its steps until it is asked to stop; a seed of 14 fails.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

WAITS, FAILS = 13, 14


def main() -> int:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # what is asked before the wait is not lost
    config = yaml.safe_load(Path(sys.argv[1]).read_text())
    address = f"{config['run']['output_dir']}/{config['run']['name']}"
    if "://" not in address:
        run = Path(address)
        run.mkdir(parents=True, exist_ok="--resume" in sys.argv)
        return train(config, run, lambda target: (run / "exports" / "final").symlink_to(target))
    from dist_ft.run.exports import FINAL
    from dist_ft.run.place import RECORDS, open_run
    from dist_ft.run.sync import Sender

    opened = open_run(address)
    opened.fetch(*RECORDS)
    opened.store.create_exclusive("attempts/0001.json", b"{}")
    sender = Sender(opened, every_s=0.1)
    sender.attempt = 1
    try:
        return train(config, opened.path, lambda target: opened.point(FINAL, target))
    finally:
        sender.close()


def train(config: dict[str, Any], run: Path, point_at: Callable[[str], None]) -> int:
    is_resumed, seed = "--resume" in sys.argv, config["run"]["seed"]
    (run / "config.yaml").write_text(Path(sys.argv[1]).read_text())
    every = config["checkpoint"]["every_steps"]
    steps = every * int(config["train"]["epochs"])
    first = json.loads((run / "run.json").read_text())["step"] if is_resumed else 0

    def state(name: str, step: int, error: dict[str, str] | None = None) -> None:
        record = {
            "format_version": 1, "run_id": run.name, "state": name, "attempt": 1, "step": step, "max_steps": steps,
            "world_size": 1, "workers": [], "error": error,
        }  # fmt: skip
        (run / "run.tmp").write_text(json.dumps(record))
        (run / "run.tmp").replace(run / "run.json")

    def add(name: str, **row: object) -> None:
        with (run / name).open("a") as file:
            file.write(json.dumps(row) + "\n")

    def commit(step: int) -> None:
        folder = run / "checkpoints" / f"step-{step:08d}-a0001"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "manifest.json").write_text("{}")
        add("ledger.jsonl", time=time.time(), event="commit", attempt=1, step=step)

    state("running", first)
    if seed == FAILS:
        state("failed", 0, {"type": "DivergedError", "message": "the loss is not finite"})
        return 1
    for step in range(first + 1, steps + 1):
        row = {"epoch": 0, "position": step, "lr": 1e-3, "grad_norm": 1.0, "trained_tokens": 5, "tokens": 10}
        speed = {"tokens_per_s": 1.0, "step_s": 0.1, "data_s": 0.0, "digest": "d"}
        add("metrics.jsonl", step=step, attempt=1, world_size=1, loss=1 / step, **row, **speed)
        if step % every == 0 and config["data"].get("eval"):
            add("eval.jsonl", step=step, attempt=1, eval_loss=2 / step, token_accuracy=0.5)
        if step % every == 0:
            commit(step)
        state("running", step)
        if seed == WAITS and not is_resumed and step == steps // 2:
            signal.sigwait({signal.SIGINT})
            commit(step)
            state("stopped", step)
            return 3
    export = run / "exports" / f"step-{steps:08d}"
    export.mkdir(parents=True)
    (export / "model.safetensors").write_bytes(b"weights")
    point_at(export.name)
    (run / "report.html").write_text(f"<!DOCTYPE html><title>Run</title><h1>Run {run.name}</h1><svg></svg>")
    state("completed", steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
