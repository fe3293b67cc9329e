#!/usr/bin/env python3
"""What a checkpoint costs training: dist-ft, DeepSpeed's `save_checkpoint`, `torch.distributed.checkpoint` async.

    python benchmarks/checkpoint.py [--cases lora,full] [--rounds 5] [--json FILE]

The embedded 135M model in bfloat16 with float32 masters, about 1,024 tokens a step, one worker with all cores, a case
in one process. The sides take turns on the same engine, in an order that changes from round to round:

- `none`: the steps without a save.
- `dist-ft`: `Saver.save`, as the training loop calls it, durable (fsync).
- `deepspeed`: `save_checkpoint(exclude_frozen_parameters=True)`, which writes before it returns, without fsync, and the
  bfloat16 weights besides.
- `dcp`: `async_save` of the same tensors as dist-ft (masters and moments) with a stager that is kept, so that it reuses
  its memory; durable.

A turn is a save, some steps, and the wait until the save is on disk. *Blocking* is the time until the call
returns, and what the next update waits for the copy.
*Slowdown* is what a turn takes more than that of `none` in the same round, over ten steps of the median length: the
cost at `checkpoint.every_steps=10`. The first save of each side is shown by itself: it takes memory from the system,
and that of dist-ft computes the probe. `copy` is one copy of as many bytes as dist-ft saves, into memory that is held.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

STEPS = {"lora": 2, "full": 2}
"""Steps of a turn; longer than any side writes."""
SIDES = ("none", "dist-ft", "deepspeed", "dcp")
INTERVAL = 10


def make_config(case: str, directory: str) -> Any:
    """Return the run config of a case."""
    from dist_ft.config import config_from_dict

    return config_from_dict(
        {
            "run": {"name": case, "output_dir": directory},
            "model": {"name": "smollm2-135m-instruct", "dtype": "bfloat16"},
            "method": {"kind": case},
            "data": {"train": [{"source": "embedded:orders/train"}], "seq_len": 128},
            "train": {"global_batch_size": 11, "micro_batch_size": 11, "max_steps": 1000},
            "optimizer": {"lr": 1e-5},
            "zero": {"stage": 1},
            "monitor": {"wandb": "disabled"},
        }
    )


class Collect:
    """A link that hears when a save is staged."""

    def __init__(self) -> None:
        self.staged = threading.Event()

    def send(self, message: Any) -> None:
        """Take a message."""
        if message.kind == "staged":
            self.staged.set()

    def should_stop(self) -> bool:
        """Never."""
        return False

    def wait_committed(self, step: int) -> None:
        """Nobody commits."""


def build(case: str, directory: str) -> Any:
    """Build the rank of a case."""
    import torch

    from dist_ft.jobs.prepare import prepare
    from dist_ft.run.attempt_spec import AttemptSpec, RankSpec
    from dist_ft.train.build import build_rank
    from dist_ft.zero.engine import init_process_group, open_store

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    config = make_config(case, directory)
    inputs = replace(prepare(config).inputs, eval_split=None)
    run_dir = str(Path(directory) / "run")
    attempt = AttemptSpec(run_id=case, attempt=1, run_dir=run_dir, config=config, inputs=inputs)
    init_process_group(open_store("127.0.0.1", 0, 1), 0, 1, on_gpu=False)
    return build_rank(RankSpec(attempt, 0, 1, 0, "127.0.0.1", torch.get_num_threads()))


def take_step(parts: Any, saver: Any, step: int) -> tuple[int, float]:
    """Take an optimizer step as the training loop does; return its tokens, and the seconds it waited for a copy."""
    import torch

    from dist_ft.objectives.objective import Rows

    batch = parts.loader.step(step)
    divisor = parts.objective.weight(batch.totals)
    for index, micro in enumerate(batch.micro_batches):
        parts.dropout_keys.step = step
        parts.dropout_keys.slots = torch.from_numpy(micro.slots)
        parts.dropout_keys.lengths = torch.from_numpy((micro.samples >= 0).sum(1))
        sums = parts.engine(Rows.of(micro, parts.engine.device), parts.objective.loss)
        parts.engine.backward(sums[0] / divisor)
        if index + 1 < len(batch.micro_batches):
            parts.engine.end_micro_step()
    began = time.perf_counter()
    saver.wait_copied()
    waited_s = time.perf_counter() - began
    parts.engine.apply_step(1.0)
    return int(batch.totals.num_tokens), waited_s


def measure(case: str, rounds: int, directory: str) -> dict[str, Any]:
    """Run a case in this process."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    from dist_ft.train.saving import Saver
    from dist_ft.zero.partitions import collect_slices

    parts = build(case, directory)
    parts.engine.train()
    link = Collect()
    saver = Saver(parts, link)
    stager = DefaultStager(StagingOptions(False, False, False, False))
    scratch = Path(directory) / "peers"
    Wait = Callable[[], object]

    def save_dist_ft(step: int) -> Wait:
        link.staged.clear()
        saver.save(step)
        return saver.finish

    def save_deepspeed(step: int) -> Wait:
        parts.engine.raw.save_checkpoint(str(scratch), tag=f"step-{step}", exclude_frozen_parameters=True)
        return lambda: None

    def save_dcp(step: int) -> Wait:
        state = {key.encode(): tensor.detach() for key, tensor in collect_slices(parts.engine)}
        future = dcp.async_save(state, checkpoint_id=str(scratch / f"dcp-{step}"), async_stager=stager)
        return future.result  # type: ignore[no-any-return]

    def save_nothing(step: int) -> Wait:
        return lambda: None

    saves = {"none": save_nothing, "dist-ft": save_dist_ft, "deepspeed": save_deepspeed, "dcp": save_dcp}
    step = 0
    blocking: dict[str, list[float]] = {side: [] for side in SIDES}
    turns: dict[str, list[float]] = {side: [] for side in SIDES}
    waits: dict[str, list[float]] = {side: [] for side in SIDES}
    step_s, tokens = [], []
    for number in range(rounds + 1):  # the first is not counted
        turn = number % len(SIDES)
        for side in (*SIDES[turn:], *SIDES[:turn]):
            if step == 0:
                take_step(parts, saver, step)
                step += 1
            began = time.perf_counter()
            wait = saves[side](step)
            blocking[side].append(time.perf_counter() - began)
            for _ in range(STEPS[case]):
                step_began = time.perf_counter()
                num_tokens, waited_s = take_step(parts, saver, step)
                tokens.append(num_tokens)
                blocking[side][-1] += waited_s
                if side == "none" and number:
                    step_s.append(time.perf_counter() - step_began)
                step += 1
            wait_began = time.perf_counter()
            wait()
            waits[side].append(time.perf_counter() - wait_began)
            turns[side].append(time.perf_counter() - began)
            shutil.rmtree(scratch, ignore_errors=True)
            shutil.rmtree(Path(directory) / "run" / "checkpoints", ignore_errors=True)
            os.sync()  # what one side has left to write is not another's
    parts.loader.close()
    step_median = statistics.median(step_s)
    extra = {side: [a - b for a, b in zip(turns[side], turns["none"], strict=True)][1:] for side in SIDES}
    num_bytes = sum(4 * tensor.numel() for _, tensor in collect_slices(parts.engine))
    source, target = torch.ones(1 << 27), torch.ones(1 << 27)
    copies = []
    for _ in range(5):
        began = time.perf_counter()
        target.copy_(source)
        copies.append(time.perf_counter() - began)
    saving = SIDES[1:]
    return {
        "case": case,
        "threads": torch.get_num_threads(),
        "tokens_a_step": round(statistics.mean(tokens)),
        "step_s": round(step_median, 3),
        "step_s_range": [round(min(step_s), 3), round(max(step_s), 3)],
        "megabytes": round(num_bytes / 1e6, 1),
        "copy_s": round(statistics.median(copies) * num_bytes / source.nbytes, 4),
        "blocking_s": {side: round(statistics.median(blocking[side][1:]), 4) for side in saving},
        "blocking_max_s": {side: round(max(blocking[side][1:]), 4) for side in saving},
        "first_blocking_s": {side: round(blocking[side][0], 4) for side in saving},
        "waited_at_the_end_s": {side: round(statistics.median(waits[side][1:]), 4) for side in saving},
        "slowdown": {side: round(statistics.median(extra[side]) / (INTERVAL * step_median), 4) for side in saving},
        "slowdown_range": {
            side: [round(f(extra[side]) / (INTERVAL * step_median), 4) for f in (min, max)] for side in saving
        },
    }


def main() -> None:
    """Run the cases, each in a process of its own, and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="lora,full")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--case", choices=STEPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case is not None:
        with tempfile.TemporaryDirectory(prefix="dist-ft-checkpoint-") as directory:
            print(json.dumps(measure(options.case, options.rounds, directory)))
        return
    results = []
    for case in options.cases.split(","):
        command = [sys.executable, __file__, "--case", case, "--rounds", str(options.rounds)]
        env = {**os.environ, "DS_ACCELERATOR": "cpu", "TQDM_DISABLE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
        if done.returncode != 0:
            sys.exit(done.stderr)
        results.append(json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps(results[-1]), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
