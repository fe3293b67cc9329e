"""Plain DeepSpeed around a plain model: what a team that leaves dist-ft has, and what one that comes brings.

Only the batches are those of dist-ft. Bodies for `tests.helpers.ranks`.
"""

from __future__ import annotations

import os
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator

from dist_ft.config import Config, config_from_dict
from dist_ft.data.stream.cache import open_split
from dist_ft.data.stream.loader import RankLayout, StepBatch, TrainLoader, build_order
from dist_ft.model.embedded import materialise
from dist_ft.run.run_inputs import RunInputs
from dist_ft.slots import num_micro_steps

MICRO_BATCH = 2


def go_on(
    rank: int,
    world_size: int,
    config: dict[str, Any],
    prepared: dict[str, Any],
    directory: str,
    stage: int,
    num_steps: int,
) -> dict[str, Any]:
    """Load a universal checkpoint and take steps; return their losses and what the checkpoint says."""
    parsed = config_from_dict(config)
    engine = build(parsed, world_size, stage, load_universal=True)
    path, client = engine.load_checkpoint(directory)
    assert path is not None
    loaded_steps = engine.global_steps
    loader = open_loader(parsed, prepared, rank, world_size)
    first = int(client["dist_ft"]["step"])
    losses = [take_step(engine, loader.step(first + number), world_size) for number in range(num_steps)]
    loader.close()
    return {"losses": losses, "client_state": client["dist_ft"], "global_steps": loaded_steps}


def train_and_save(
    rank: int,
    world_size: int,
    config: dict[str, Any],
    prepared: dict[str, Any],
    directory: str,
    stage: int,
    save_at: int,
    num_steps: int,
) -> list[float]:
    """Train from the base model, save DeepSpeed's own checkpoint on the way; return the losses."""
    parsed = config_from_dict(config)
    engine = build(parsed, world_size, stage)
    loader = open_loader(parsed, prepared, rank, world_size)
    losses = []
    for step in range(num_steps):
        losses.append(take_step(engine, loader.step(step), world_size))
        if step + 1 == save_at:
            engine.save_checkpoint(directory)
    loader.close()
    return losses


def train_with_trainer(rank: int, world_size: int, config: dict[str, Any], directory: str, num_steps: int) -> None:
    """Train with the Hugging Face Trainer, which leaves `checkpoint-N`; keep what it holds in `state.safetensors`."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # or the Trainer joins a group
        os.environ.pop(name)
    parsed = config_from_dict(config)
    model = plain_model(parsed)
    rows = [{"input_ids": ids, "labels": ids} for ids in ([5 + i % 40, 7, 9, 11 + i % 3] for i in range(64))]
    arguments = TrainingArguments(
        directory, max_steps=num_steps, save_steps=num_steps, per_device_train_batch_size=8, report_to="none", seed=1,
        learning_rate=1e-3, weight_decay=0.1, use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=default_data_collator)
    trainer.train()
    state = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kept = trainer.optimizer.optimizer.state[parameter]
            state |= {f"{name}|{kind}": kept[kind].reshape(-1).contiguous() for kind in ("exp_avg", "exp_avg_sq")}
            state[f"{name}|fp32"] = parameter.detach().reshape(-1).clone()
    save_file(state, f"{directory}/state.safetensors")


def plain_model(config: Config) -> Any:
    """Return the config's model, as its users load it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(materialise(config.model.name), dtype=torch.float32)
    if config.method.kind == "full":
        return model
    method = config.method
    adapter = LoraConfig(task_type="CAUSAL_LM", r=method.r, lora_alpha=method.lora_alpha, target_modules="all-linear")
    return get_peft_model(model, adapter)


def build(config: Config, world_size: int, stage: int, load_universal: bool = False) -> Any:
    """Return an engine around the config's model, as its users write it."""
    model = plain_model(config)
    optimizer = config.optimizer
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = {id(p): optimizer.weight_decay if p.dim() > 1 else 0.0 for p in trained}
    groups = [
        {"params": [p for p in trained if decayed[id(p)] == decay], "weight_decay": decay}
        for decay in dict.fromkeys(decayed.values())
    ]
    inner = torch.optim.AdamW(groups, lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps, fused=True)
    passes = num_micro_steps(config.train.global_batch_size, MICRO_BATCH, world_size)
    settings = {
        "train_batch_size": MICRO_BATCH * passes * world_size,
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_accumulation_steps": passes,
        "gradient_clipping": optimizer.max_grad_norm,
        "zero_optimization": {"stage": stage},
        "checkpoint": {"load_universal": load_universal},
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=inner, config=settings, dist_init_required=False)
    return engine


def open_loader(config: Config, prepared: dict[str, Any], rank: int, world_size: int) -> TrainLoader:
    """Return the steps of a run."""
    inputs = RunInputs.from_dict(prepared)
    shards = [open_split(split, config.data.loader) for split in inputs.splits]
    return TrainLoader(
        build_order(shards, config.data, config.run.seed), shards, RankLayout(rank, world_size, MICRO_BATCH),
        config.train.global_batch_size, inputs.num_positions,
    )  # fmt: skip


def take_step(engine: Any, batch: StepBatch, world_size: int) -> float:
    """Take a step and return the loss over all ranks."""
    divisor = batch.totals.num_trained_tokens
    total = torch.zeros(1, dtype=torch.float64)
    for micro in batch.micro_batches:
        logits = engine(input_ids=torch.from_numpy(micro.input_ids), use_cache=False).logits.float()
        targets = torch.from_numpy(micro.targets)
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
        engine.backward(loss * (world_size / divisor), scale_wrt_gas=False)
        engine.step()
        total += loss.detach().double()
    dist.all_reduce(total)
    return float(total) / divisor
