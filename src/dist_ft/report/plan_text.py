"""Renders the plan of a run as text."""

from __future__ import annotations

import textwrap

from dist_ft.jobs.plan.planned import Plan
from dist_ft.printable import format_bytes, format_count


def render_plan(plan: Plan) -> str:
    """Return the plan as a page of text."""
    model, data = plan.model, plan.data
    method = {"full": "full fine-tuning", "lora": "LoRA"}[plan.method]
    trained = "all trained"
    if model.num_trained < model.num_params:
        trained = f"{model.num_trained:,} trained ({model.num_trained / model.num_params:.1%})"
    held_out = f"{data.eval_sequences:,}" if data.eval_sequences else "none"
    if data.sequences is None or data.tokens is None or data.trained_tokens is None:
        size = f"{format_count(data.shards, 'shard')}, prepared while training goes on; {held_out} held out"
        epochs = ""
    else:
        size = (
            f"{data.rows:,} rows in {data.sequences:,} sequences, {held_out} held out; "
            f"{data.tokens:,} tokens, {data.trained_tokens / data.tokens:.0%} trained"
        )
        epochs = f"; {plan.positions / data.sequences:.2f} epochs"
    lines = [
        f"{plan.run}: {plan.objective}, {method} of {model.name}",
        f"  model   {model.num_params:,} parameters, {trained}, {model.dtype}; "
        f"{model.layers} layers of width {model.hidden}",
        f"  data    {size}",
        f"  steps   {plan.steps:,} of {plan.global_batch_size:,} sequences, about "
        f"{plan.tokens_per_step:,} tokens each{epochs}",
        *_render_scores(plan),
        f"  state   {plan.optimizer}, {plan.state_bytes} bytes a trained parameter",
        f"  output  {plan.run_dir}",
        "",
        f"  workers  passes a step  padding  memory of a worker (ZeRO {plan.zero_stage})",
    ]
    for row in plan.world_sizes:
        memory = plan.memory_at(row.world_size)[plan.zero_stage].memory
        lines.append(
            f"  {row.world_size:>7}  {row.micro_steps:>13}  {row.padding_share:>7.1%}"
            f"  {format_bytes(memory.total_bytes)}"
        )
    lines += ["", *_render_memory(plan)]
    if plan.zero_note:
        lines.append(f"  {plan.zero_note}")
    if plan.warnings:
        lines.append("")
    for warning in plan.warnings:
        # Paths are not cut, so that they can be copied.
        lines.append(
            textwrap.fill(
                f"warning: {warning}", 100, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False
            )
        )
    return "\n".join(lines)


def _render_scores(plan: Plan) -> list[str]:
    scores = plan.scores
    if scores is None:
        return []
    cost = ""
    if scores.num_bytes is not None and scores.share_of_work is not None:
        cost = f": {format_bytes(scores.num_bytes)}, {scores.share_of_work:.0%} of the work of the training"
    return [f"  scores  {', '.join(scores.columns)} by {scores.model}, written before training{cost}"]


def _render_memory(plan: Plan) -> list[str]:
    size = plan.world_sizes[0].world_size
    workers = format_count(size, "worker")
    lines = [f"  ZeRO    weights  gradients  optimizer  activations      total  (estimate, {workers})"]
    for row in plan.memory_at(size):
        memory = row.memory
        columns = (
            (memory.weights_bytes, 9), (memory.gradients_bytes, 9), (memory.optimizer_bytes, 9),
            (memory.activations_bytes, 11), (memory.total_bytes, 9),
        )  # fmt: skip
        cells = "  ".join(f"{format_bytes(count):>{width}}" for count, width in columns)
        chosen = "  <- this run" if row.stage == plan.zero_stage else ""
        offloaded = f"  + {format_bytes(memory.host_bytes)} of host" if memory.host_bytes else ""
        lines.append(f"  {row.stage:>4}  {cells}{offloaded}{chosen}")
    return lines
