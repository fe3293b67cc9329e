"""Computes what `dist-ft plan` shows: everything about a run that needs no cluster.

Owns the numbers and the warnings. The memory formulas are in `memory.py`; `jobs/prepare.py` checks data and model
exactly as for a run; `report/plan_text.py` renders the plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from dist_ft.config import Config, with_commit
from dist_ft.data.shards.counts import total
from dist_ft.data.shards.split import describe_omissions
from dist_ft.data.stream.cache import open_split
from dist_ft.data.stream.loader import LENGTH_MULTIPLE, build_order, fitting_batch
from dist_ft.data.stream.order import step_positions
from dist_ft.jobs.plan.cost import flops, trained_shape
from dist_ft.jobs.plan.planned import MemoryRow, Plan, PlannedData, PlannedModel, PlannedScores, SizeRow
from dist_ft.jobs.score import num_frozen_params
from dist_ft.machine import available_memory_bytes, count_gpus
from dist_ft.memory import STAGES, BatchShape, ModelShape, estimate
from dist_ft.model.base import quantisation_of
from dist_ft.objectives.kinds import build_objective
from dist_ft.printable import format_bytes
from dist_ft.run.run_inputs import RunInputs
from dist_ft.slots import layout_slots, num_micro_steps, round_up

_MAX_SIZES = 8
_MAX_SAMPLED_STEPS = 50
_MAX_SAMPLED_SEQUENCES = 50_000
_WASTEFUL_SHARE = 0.25

Lengths = list[int]
"""Tokens of the sequences of one step."""


def make_plan(config: Config, inputs: RunInputs) -> Plan:
    """Return the plan of a run.

    Args:
        config: A checked config.
        inputs: Inputs that the preparation found; the run itself reuses the token shards.
    """
    config = with_commit(config, inputs.commit)
    shape = trained_shape(config)
    is_streamed = config.data.preparation == "stream"
    if is_streamed:
        steps = [[config.data.seq_len] * config.train.global_batch_size]
    else:
        steps = list(_sample_steps(config, inputs))
    every = [*inputs.splits, *([inputs.eval_split] if inputs.eval_split else [])]
    rows_per_slot = build_objective(config.objective).rows_per_slot
    batches = {
        size: fitting_batch(config, shape, every, size, config.cluster.memory_per_worker_bytes, rows_per_slot)
        for size in world_sizes(config.cluster.min_workers, config.cluster.max_workers)
    }
    memory = tuple(row for size, batch in batches.items() for row in _memory_rows(config, shape, batch, size))
    rows = tuple(_size_row(config, steps, size, batch.num_sequences) for size, batch in batches.items())
    scores = _scores(config, inputs, shape)
    warnings = [
        *describe_omissions(inputs.splits, inputs.eval_split, config.data),
        *_preparation_warnings(config, shape, scores),
    ]
    zero_note = (
        f"zero.stage={config.zero.stage} with {config.model.torch_dtype} runs as stage {config.zero_stage}: "
        "DeepSpeed's plain path cannot sum gradients in float32"
    )
    return Plan(
        run=config.run.name,
        run_dir=config.run.address,
        model=PlannedModel(
            name=config.model.name,
            num_params=shape.num_params,
            num_trained=shape.num_trained,
            dtype=config.model.torch_dtype,
            layers=shape.num_layers,
            hidden=shape.hidden_size,
        ),
        method=config.method.kind,
        objective=config.objective.kind,
        scores=scores,
        optimizer=config.optimizer.title,
        state_bytes=shape.state_bytes,
        data=_data(inputs),
        steps=inputs.max_steps,
        positions=inputs.num_positions,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        tokens_per_step=round(sum(map(sum, steps)) / len(steps)),
        zero_stage=config.zero_stage,
        zero_note=zero_note if config.zero_stage != config.zero.stage else None,
        memory=memory,
        world_sizes=rows,
        warnings=(*warnings, *_warnings(config, rows, memory)),
    )


def _preparation_warnings(config: Config, shape: ModelShape, scores: PlannedScores | None) -> Iterator[str]:
    """Yield what to know of data that is made, or scored by a frozen model, before or beside the training."""
    if config.data.preparation == "stream":
        yield (
            "data.preparation=stream: no row was read but the held-out ones; every sequence is counted as full "
            f"(data.seq_len={config.data.seq_len})"
        )
        if scores is not None:
            yield (
                "data.preparation=stream: while workers train, each node also scores data by a frozen model, which "
                f"takes {format_bytes(shape.num_params * shape.dtype_bytes)} and a share of its device"
            )
    if scores is not None and scores.share_of_work is not None and scores.share_of_work > 1:
        yield (
            f"scoring all data by {scores.model} takes {scores.share_of_work:.1f} times the work of the training, "
            "which uses a part of it; set max_rows of the sources, or data.preparation=stream and a small data.part_mib"
        )


def world_sizes(fewest: int, most: int) -> list[int]:
    """Return the world sizes to show: all, or if there are many, the two ends and the powers of two between them."""
    if most - fewest < _MAX_SIZES:
        return list(range(fewest, most + 1))
    powers = (1 << exponent for exponent in range(most.bit_length()))
    return sorted({fewest, most, *(power for power in powers if fewest < power < most)})


def _sample_steps(config: Config, inputs: RunInputs) -> Iterator[Lengths]:
    """Yield the sequence lengths of evenly spaced steps, read as the loader reads them."""
    shards = [open_split(split, config.data.loader) for split in inputs.splits]
    order = build_order(shards, config.data, config.run.seed)
    steps, global_batch = inputs.max_steps, config.train.global_batch_size
    count = max(1, min(steps, _MAX_SAMPLED_STEPS, _MAX_SAMPLED_SEQUENCES // global_batch))
    for index in range(count):
        ids = order.locate(np.array(step_positions(index * steps // count, global_batch, inputs.num_positions)))
        yield [int(shards[i.source].index_rows(i.shard, np.array([i.row])).num_tokens[0]) for i in ids]


def _data(inputs: RunInputs) -> PlannedData:
    known = [split.counts for split in inputs.splits if split.counts is not None]
    counts = total(known) if len(known) == len(inputs.splits) else None
    return PlannedData(
        rows=counts.num_rows if counts else None,
        sequences=counts.num_sequences if counts else None,
        tokens=counts.num_tokens if counts else None,
        trained_tokens=counts.num_trained_tokens if counts else None,
        untrained_rows=counts.num_untrained_rows if counts else None,
        long_samples=counts.num_long_samples if counts else None,
        bad_rows=counts.num_bad_rows if counts else None,
        shards=sum(split.num_shards for split in inputs.splits),
        eval_sequences=inputs.eval_split.known_counts.num_sequences if inputs.eval_split else 0,
    )


def _scores(config: Config, inputs: RunInputs, shape: ModelShape) -> PlannedScores | None:
    scorer = build_objective(config.objective).scorer
    if scorer is None:
        return None
    model = scorer.model or "the model of the first step"
    names = tuple(column.name for column in scorer.columns)
    known = [split.counts for split in inputs.splits if split.counts is not None]
    if len(known) < len(inputs.splits):
        return PlannedScores(model, names, None, None)
    trained_on, all_counts = (
        total(known),
        total([*known, *([inputs.eval_split.known_counts] if inputs.eval_split else [])]),
    )
    size = sum(column.num_bytes(all_counts.num_samples, all_counts.num_trained_tokens) for column in scorer.columns)
    used = inputs.num_positions / trained_on.num_sequences
    work = flops(shape.num_params, shape.num_trained, round(used * trained_on.num_tokens))
    return PlannedScores(
        model, names, size, round(2 * num_frozen_params(config, scorer) * all_counts.num_tokens / work, 4)
    )


def _memory_rows(config: Config, model: ModelShape, batch: BatchShape, size: int) -> Iterator[MemoryRow]:
    # A quantised base is not cut.
    for stage in STAGES if quantisation_of(config) is None else STAGES[:3]:
        # The stage that each setting of zero.stage really runs.
        here = config.model_copy(update={"zero": config.zero.model_copy(update={"stage": stage})})
        memory = estimate(model, batch, stage=here.zero_stage, world_size=size, offload=config.zero.offload)
        yield MemoryRow(size, stage, memory)


def _size_row(config: Config, steps: Sequence[Lengths], size: int, micro: int) -> SizeRow:
    global_batch = config.train.global_batch_size
    computed = 0  # token places of all ranks, padding rows included
    for lengths in steps:
        for ranks in layout_slots(lengths, micro, size, global_batch):
            longest = (max((lengths[slot] for slot in slots), default=1) for slots in ranks)
            computed += sum(micro * round_up(length, LENGTH_MULTIPLE) for length in longest)
    micro_steps = num_micro_steps(global_batch, micro, size)
    return SizeRow(
        world_size=size,
        micro_batch_size=micro,
        micro_steps=micro_steps,
        padding_share=round(1 - sum(map(sum, steps)) / computed, 4),
        surplus_slots=micro_steps * micro * size - global_batch,
    )


def _warnings(config: Config, rows: Sequence[SizeRow], memory: Sequence[MemoryRow]) -> Iterator[str]:
    global_batch, micro = config.train.global_batch_size, config.train.micro_batch_size
    wasteful = [
        str(row.world_size) for row in rows if row.surplus_slots > _WASTEFUL_SHARE * (global_batch + row.surplus_slots)
    ]
    if wasteful:
        yield (
            f"with {', '.join(wasteful)} workers over a quarter of a step is padding: "
            f"train.micro_batch_size={micro} x workers does not fit train.global_batch_size={global_batch}; "
            "lower the micro batch or raise the global one"
        )
    for row in rows:
        if row.micro_batch_size < micro:
            yield (
                f"{row.world_size} workers take passes of {row.micro_batch_size} sequences: {micro} are "
                f"estimated not to fit cluster.memory_per_worker={config.cluster.memory_per_worker:g} GiB"
            )
    # On a Ray that we start without GPUs, all workers share this machine's memory.
    available = available_memory_bytes()
    if config.cluster.address is not None or count_gpus() or available is None:
        return
    needed = max(
        row.world_size * (row.memory.total_bytes + row.memory.host_bytes)
        for row in memory
        if row.stage == config.zero.stage
    )
    if needed > available:
        yield (
            f"the workers need about {format_bytes(needed)} on this machine, {format_bytes(available)} are free; "
            "lower train.micro_batch_size or cluster.num_workers, or set train.gradient_checkpointing=true"
        )
