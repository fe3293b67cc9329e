"""What `dist-ft plan` computes: everything about a run that needs no cluster.

Owns the checks' order, the numbers and their text. The memory formulas are `memory.py`'s, the data and the
model's limits are checked by `jobs/prepare.py`, exactly as a run does it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from dist_ft.config import Config, with_commit
from dist_ft.data.shards.counts import describe_left_out
from dist_ft.data.shards.split import PreparedSplit
from dist_ft.data.stream.cache import open_split
from dist_ft.data.stream.loader import LENGTH_MULTIPLE, build_order, largest_batch
from dist_ft.data.stream.order import step_positions
from dist_ft.jobs.plan.cost import trained_shape
from dist_ft.machine import available_memory_bytes, count_gpus
from dist_ft.memory import STAGES, BatchShape, ModelShape, estimate, fitting_micro_batch
from dist_ft.printable import format_bytes
from dist_ft.run.run_inputs import RunInputs
from dist_ft.slots import layout_slots, num_micro_steps, round_up

_MAX_SIZES = 8
_MAX_SAMPLED_STEPS = 50
_MAX_SAMPLED_SEQUENCES = 50_000
_WASTEFUL_SHARE = 0.25

Lengths = list[int]
"""Tokens of the sequences of one step."""


def make_plan(config: Config, inputs: RunInputs) -> dict[str, Any]:
    """Returns what the run will take, as JSON values.

    Args:
        config: A checked config.
        inputs: What the preparation found; the run itself reuses the token shards.
    """
    config = with_commit(config, inputs.commit)
    shape = trained_shape(config)
    splits = inputs.splits
    is_streamed = config.data.preparation == "stream"
    if is_streamed:
        steps = [[config.data.seq_len] * config.train.global_batch_size]
    else:
        steps = list(_sample_steps(config, splits, inputs.max_steps, inputs.num_positions))
    held_out = [inputs.eval_split] if inputs.eval_split else []
    batch = largest_batch(config, [*splits, *held_out])
    sizes = world_sizes(config.cluster.min_workers, config.cluster.max_workers)
    micro = {size: _micro_batch_size(config, shape, batch, size) for size in sizes}
    plan = {
        "run": config.run.name,
        "run_dir": config.run.address,
        "model": {
            "name": config.model.name,
            "num_params": shape.num_params,
            "num_trained": shape.num_trained,
            "dtype": config.model.torch_dtype,
            "layers": shape.num_layers,
            "hidden": shape.hidden_size,
        },
        "method": config.method.kind,
        "data": _data(splits, inputs.eval_split),
        "steps": inputs.max_steps,
        "positions": inputs.num_positions,
        "global_batch_size": config.train.global_batch_size,
        "micro_batch_size": config.train.micro_batch_size,
        "tokens_per_step": round(sum(map(sum, steps)) / len(steps)),
        "zero_stage": config.zero_stage,
        "zero_note": _zero_note(config),
        "memory": [
            row
            for size in sizes
            for row in _memory_rows(config, shape, replace(batch, num_sequences=micro[size]), size)
        ],
        "world_sizes": [_size_row(config, steps, size, micro[size]) for size in sizes],
    }
    left_out = describe_left_out(splits, inputs.eval_split, config.data)
    if is_streamed:
        left_out.append(
            "data.preparation=stream: no row was read but the held-out ones; every sequence is counted as full "
            f"(data.seq_len={config.data.seq_len})"
        )
    return {**plan, "warnings": left_out + _warnings(config, plan)}


def world_sizes(fewest: int, most: int) -> list[int]:
    """Returns the sizes to show: all, or the ends and the powers of two between when there are many."""
    if most - fewest < _MAX_SIZES:
        return list(range(fewest, most + 1))
    powers = (1 << exponent for exponent in range(most.bit_length()))
    return sorted({fewest, most, *(power for power in powers if fewest < power < most)})


def _sample_steps(config: Config, splits: Sequence[PreparedSplit], steps: int, positions: int) -> Iterator[Lengths]:
    """Yields the sequence lengths of evenly spaced steps, read as the loader reads them."""
    shards = [open_split(split, config.data.loader) for split in splits]
    order = build_order(shards, config.data, config.run.seed)
    global_batch = config.train.global_batch_size
    count = max(1, min(steps, _MAX_SAMPLED_STEPS, _MAX_SAMPLED_SEQUENCES // global_batch))
    for index in range(count):
        ids = order.locate(np.array(step_positions(index * steps // count, global_batch, positions)))
        yield [int(shards[i.source].sizes(i.shard, np.array([i.row]))[0, 0]) for i in ids]


def _data(splits: Sequence[PreparedSplit], eval_split: PreparedSplit | None) -> dict[str, int | None]:
    """Returns totals of the training data; None for each while shards are still to be made."""
    eval_sequences = eval_split.num_sequences if eval_split else 0
    if not all(split.is_complete for split in splits):
        unknown = ("rows", "sequences", "tokens", "trained_tokens", "untrained_rows", "long_samples", "bad_rows")
        return {**dict.fromkeys(unknown), "shards": sum(split.num_shards for split in splits),
                "eval_sequences": eval_sequences}  # fmt: skip
    return {
        "rows": sum(split.num_rows for split in splits),
        "sequences": sum(split.num_sequences for split in splits),
        "tokens": sum(split.num_tokens for split in splits),
        "trained_tokens": sum(split.num_trained_tokens for split in splits),
        "untrained_rows": sum(split.num_untrained_rows for split in splits),
        "long_samples": sum(split.num_long_samples for split in splits),
        "bad_rows": sum(split.num_bad_rows for split in splits),
        "shards": sum(split.num_shards for split in splits),
        "eval_sequences": eval_sequences,
    }


def _memory_rows(config: Config, model: ModelShape, batch: BatchShape, size: int) -> Iterator[dict[str, int]]:
    for stage in STAGES:
        # What each setting of zero.stage really runs.
        here = config.model_copy(update={"zero": config.zero.model_copy(update={"stage": stage})})
        memory = estimate(model, batch, stage=here.zero_stage, world_size=size, offload=config.zero.offload)
        yield {"world_size": size, "stage": stage, **asdict(memory), "total_bytes": memory.total_bytes}


def _micro_batch_size(config: Config, model: ModelShape, batch: BatchShape, size: int) -> int:
    """As a run chooses it (`train/build.py`) where memory is known without its GPUs."""
    limit = config.cluster.memory_per_worker
    if limit is None:
        return batch.num_sequences
    return fitting_micro_batch(
        model,
        batch,
        stage=config.zero_stage,
        world_size=size,
        limit_bytes=int(limit * (1 << 30)),
        offload=config.zero.offload,
    )


def _size_row(config: Config, steps: Sequence[Lengths], size: int, micro: int) -> dict[str, Any]:
    global_batch = config.train.global_batch_size
    micro_steps = num_micro_steps(global_batch, micro, size)
    used = sum(map(sum, steps))
    computed = sum(_computed_tokens(lengths, micro, size, global_batch) for lengths in steps)
    return {
        "world_size": size,
        "micro_batch_size": micro,
        "micro_steps": micro_steps,
        "padding_share": round(1 - used / computed, 4),
        "surplus_slots": micro_steps * micro * size - global_batch,
    }


def _computed_tokens(lengths: Sequence[int], micro_batch_size: int, world_size: int, num_slots: int) -> int:
    """Returns the token places that all ranks compute in one step, padding rows included."""
    layout = layout_slots(lengths, micro_batch_size, world_size, num_slots)
    longest = (max((lengths[slot] for slot in slots), default=1) for ranks in layout for slots in ranks)
    return sum(micro_batch_size * round_up(length, LENGTH_MULTIPLE) for length in longest)


def _zero_note(config: Config) -> str | None:
    if config.zero_stage == config.zero.stage:
        return None
    return (
        f"zero.stage={config.zero.stage} with {config.model.torch_dtype} runs as stage {config.zero_stage}: "
        "DeepSpeed's plain path cannot sum gradients in float32"
    )


def _warnings(config: Config, plan: dict[str, Any]) -> list[str]:
    lines = []
    global_batch, micro = config.train.global_batch_size, config.train.micro_batch_size
    wasteful = [
        str(row["world_size"]) for row in plan["world_sizes"]
        if row["surplus_slots"] > _WASTEFUL_SHARE * (global_batch + row["surplus_slots"])
    ]  # fmt: skip
    if wasteful:
        lines.append(
            f"with {', '.join(wasteful)} workers over a quarter of a step is padding: "
            f"train.micro_batch_size={micro} x workers does not fit train.global_batch_size={global_batch}; "
            "lower the micro batch or raise the global one"
        )
    for row in plan["world_sizes"]:
        if row["micro_batch_size"] < micro:
            lines.append(
                f"{row['world_size']} workers take passes of {row['micro_batch_size']} sequences: {micro} are "
                f"estimated not to fit cluster.memory_per_worker={config.cluster.memory_per_worker:g} GiB"
            )
    return lines + _local_warnings(config, plan)


def _local_warnings(config: Config, plan: dict[str, Any]) -> list[str]:
    """On a Ray that we start without GPUs, all workers share this machine's memory."""
    available = available_memory_bytes()
    if config.cluster.address is not None or count_gpus() or available is None:
        return []
    rows = [row for row in plan["memory"] if row["stage"] == config.zero.stage]
    needed = max(row["world_size"] * (row["total_bytes"] + row["host_bytes"]) for row in rows)
    if needed <= available:
        return []
    return [
        f"the workers need about {format_bytes(needed)} on this machine, {format_bytes(available)} are free; "
        "lower train.micro_batch_size or cluster.num_workers, or set train.gradient_checkpointing=true"
    ]
