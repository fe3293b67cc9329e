#!/usr/bin/env python3
"""The peer of `recovery.py`: what an informed user would write with stock Ray Train v2 and stock DeepSpeed.

    python benchmarks/recovery_stock.py SETTING.json

An elastic TorchTrainer whose train function runs DeepSpeed ZeRO and saves DeepSpeed's own checkpoint every few
steps; `ray.train.report` carries a pointer to it. A restart at the same size loads that checkpoint, one at
another size converts it to DeepSpeed's universal format first. Everything that is known to help is done: short
polls, no compiled CPU op, the fused optimizer, conversion inside a rank that has everything imported while the
others build their model. Imports nothing of dist-ft. Every moment of interest goes to a file with its time.

SETTING: `model` (directory), `batches` (directory of `WORLD_SIZE-RANK.npz`, see `recovery.py`), `scratch`,
`events` (file), `sizes` [fewest, most], `address` or null, `max_steps`, `every_steps`, `stage`, `micro_batch_size`,
`lr`, `weight_decay`, `max_grad_norm`.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TUNED_ENV = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # 2 by default: failures are noticed, and reports taken, that often
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",  # 60 by default: lost on a group that a dead node was to join
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "DS_ACCELERATOR": "cpu",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
_NEVER = 10**9
_MONITOR_S = 1.0


def write_event(path: str, event: str, **facts: Any) -> None:
    """Append one line; writes of a line are atomic, so all processes share the file."""
    line = json.dumps({"time": time.time(), "event": event, **facts}) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.write(descriptor, line.encode())
    os.close(descriptor)


def train_function(setting: dict[str, Any]) -> None:
    """One rank: builds the model, resumes, trains."""
    import ray.train

    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()

    def mark(event: str, **facts: Any) -> None:
        write_event(setting["events"], event, rank=rank, world_size=size, pid=os.getpid(), **facts)

    mark("entered")
    import deepspeed
    import torch
    from transformers import AutoModelForCausalLM

    mark("imported")
    # Else DeepSpeed compiles an op with g++ (80 s on a new machine) that helps few collectives.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    start, checkpoint = _latest(setting), Path(setting["scratch"]) / "checkpoints"
    tag = f"step-{start['step']}" if start else None
    is_resized = start is not None and start["world_size"] != size
    if is_resized and rank == 0:
        _make_universal(checkpoint, str(tag))
        mark("converted")

    model = AutoModelForCausalLM.from_pretrained(setting["model"], dtype=torch.float32)
    trained = list(model.parameters())
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": setting["weight_decay"]},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    batches = _Batches(setting, rank, size)
    engine, *_ = deepspeed.initialize(
        model=_token_loss(model),
        optimizer=torch.optim.AdamW(groups, lr=setting["lr"], fused=True),
        config=_ds_config(setting, size, batches.num_passes, sum(p.numel() for p in trained), is_resized),
        dist_init_required=False,
    )
    mark("built")
    if start is not None:
        torch.distributed.barrier()  # rank 0 may have been converting
        engine.load_checkpoint(str(checkpoint), tag=f"{tag}-universal" if is_resized else tag)
    step = start["step"] if start else 0
    mark("loaded", step=step)

    engine.train()
    while step < setting["max_steps"]:
        loss_sum, num_trained = 0.0, batches.num_trained(step)
        for index in range(batches.num_passes):
            loss = engine(*batches.get(step, index))
            engine.backward(loss * (size / num_trained), scale_wrt_gas=False)
            loss_sum += loss.item()
            engine.step()
        total = torch.tensor(loss_sum, dtype=torch.float64)
        torch.distributed.all_reduce(total)
        step += 1
        if rank == 0:
            mark("step", step=step, loss=total.item() / num_trained)
        if step % setting["every_steps"] == 0 or step == setting["max_steps"]:
            engine.save_checkpoint(str(checkpoint), tag=f"step-{step}")
            _report(rank, {"step": step, "world_size": size})


def _ds_config(
    setting: dict[str, Any], size: int, num_passes: int, num_params: int, is_universal: bool
) -> dict[str, Any]:
    return {
        "train_batch_size": setting["micro_batch_size"] * num_passes * size,
        "train_micro_batch_size_per_gpu": setting["micro_batch_size"],
        "gradient_accumulation_steps": num_passes,
        "gradient_clipping": setting["max_grad_norm"],
        "steps_per_print": _NEVER,
        "zero_optimization": {
            "stage": setting["stage"],
            "reduce_bucket_size": num_params,
            "allgather_bucket_size": num_params,
            "contiguous_gradients": True,
            "overlap_comm": False,
        },
        "checkpoint": {"load_universal": is_universal},
    }


def _token_loss(model: Any) -> Any:
    """Return a module that gives the loss sum of a micro batch; the output layer sees trained tokens only."""
    import torch
    from torch.nn import functional as F

    class TokenLoss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, targets: Any, position_ids: Any) -> Any:
            keep = targets != -100
            hidden = self.model.model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
            logits = self.model.lm_head(hidden.last_hidden_state[keep])
            return F.cross_entropy(logits.float(), targets[keep], reduction="sum")

    return TokenLoss()


class _Batches:
    """This rank's micro batches, made before."""

    def __init__(self, setting: dict[str, Any], rank: int, size: int) -> None:
        import numpy as np

        self._arrays = np.load(Path(setting["batches"]) / f"{size}-{rank}.npz")
        self.num_passes = int(self._arrays["num_passes"])
        self._num_trained = self._arrays["num_trained"]

    def num_trained(self, step: int) -> int:
        return int(self._num_trained[step])

    def get(self, step: int, index: int) -> tuple[Any, Any, Any]:
        import torch

        ids, targets, positions = self._arrays[f"{step}-{index}"]
        is_packed = (positions[:, 1:] - positions[:, :-1] != 1).any()
        return (
            torch.from_numpy(ids),
            torch.from_numpy(targets),
            torch.from_numpy(positions) if is_packed else None,
        )


def _latest(setting: dict[str, Any]) -> dict[str, Any] | None:
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as directory:
        pointer: dict[str, Any] = json.loads((Path(directory) / "pointer.json").read_text())
    return pointer


def _report(rank: int, pointer: dict[str, Any]) -> None:
    import ray.train

    if rank != 0:
        ray.train.report(pointer)
        return
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "pointer.json").write_text(json.dumps(pointer))
        ray.train.report(pointer, checkpoint=ray.train.Checkpoint.from_directory(directory))


def _make_universal(directory: Path, tag: str) -> None:
    """Convert in this process: the command line would import torch and DeepSpeed once more."""
    from argparse import Namespace

    from deepspeed.checkpoint import ds_to_universal

    ds_to_universal.main(
        Namespace(
            input_folder=str(directory / tag),
            output_folder=str(directory / f"{tag}-universal"),
            num_extract_workers=1,  # a pool would start processes, which costs more than a small model
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )


def main() -> None:
    """Run the setting to its end."""
    setting: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    os.environ.update(TUNED_ENV)

    import ray
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.callback import UserCallback

    class Notice(UserCallback):
        """Tells when the controller knows."""

        def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
            write_event(setting["events"], "commit", step=metrics[0]["step"])

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            write_event(setting["events"], "noticed", ranks=sorted(worker_exceptions))

    fewest, most = setting["sizes"]
    if setting["address"] is None:
        ray.init(address="local", num_cpus=most, include_dashboard=False, object_store_memory=100_000_000)
    else:
        ray.init(address=setting["address"])
    trainer = TorchTrainer(
        train_function,
        train_loop_config=setting,
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=(fewest, most),
            resources_per_worker={"CPU": 1},
            elastic_resize_monitor_interval_s=_MONITOR_S,
        ),
        run_config=ray.train.RunConfig(
            name="stock",
            storage_path=str(Path(setting["scratch"]) / "ray"),
            failure_config=ray.train.FailureConfig(max_failures=-1),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            callbacks=[Notice()],
        ),
    )
    trainer.fit()
    ray.shutdown()


if __name__ == "__main__":
    main()
