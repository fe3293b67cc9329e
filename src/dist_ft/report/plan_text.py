"""The plan as a page of text."""

from __future__ import annotations

import textwrap
from typing import Any

from dist_ft.printable import format_bytes


def render_plan(plan: dict[str, Any]) -> str:
    """Returns the plan as a page of text."""
    model, data = plan["model"], plan["data"]
    method = {"full": "full fine-tuning", "lora": "LoRA"}[plan["method"]]
    trained = "all trained"
    if model["num_trained"] < model["num_params"]:
        trained = f"{model['num_trained']:,} trained ({model['num_trained'] / model['num_params']:.1%})"
    held_out = f"{data['eval_sequences']:,}" if data["eval_sequences"] else "none"
    if data["sequences"] is None:
        shards = f"{data['shards']:,} shard{'s' if data['shards'] > 1 else ''}"
        size, epochs = f"{shards}, prepared while training goes on; {held_out} held out", ""
    else:
        size = (
            f"{data['rows']:,} rows in {data['sequences']:,} sequences, {held_out} held out; "
            f"{data['tokens']:,} tokens, {data['trained_tokens'] / data['tokens']:.0%} trained"
        )
        epochs = f"; {plan['positions'] / data['sequences']:.2f} epochs"
    lines = [
        f"{plan['run']}: {method} of {model['name']}",
        f"  model   {model['num_params']:,} parameters, {trained}, {model['dtype']}; "
        f"{model['layers']} layers of width {model['hidden']}",
        f"  data    {size}",
        f"  steps   {plan['steps']:,} of {plan['global_batch_size']:,} sequences, about "
        f"{plan['tokens_per_step']:,} tokens each{epochs}",
        f"  output  {plan['run_dir']}",
        "",
        *_render_sizes(plan),
        "",
        *_render_memory(plan),
    ]
    if plan["zero_note"]:
        lines.append(f"  {plan['zero_note']}")
    if plan["warnings"]:
        lines += [
            "",
            # Paths stay whole, so that they can be copied.
            *(
                textwrap.fill(
                    f"warning: {w}", 100, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False
                )
                for w in plan["warnings"]
            ),
        ]
    return "\n".join(lines)


def _render_sizes(plan: dict[str, Any]) -> list[str]:
    lines = [f"  workers  passes a step  padding  memory of a worker (ZeRO {plan['zero_stage']})"]
    for row in plan["world_sizes"]:
        memory = _memory_at(plan, row["world_size"])[plan["zero_stage"]]
        lines.append(
            f"  {row['world_size']:>7}  {row['micro_steps']:>13}  {row['padding_share']:>7.1%}"
            f"  {format_bytes(memory['total_bytes'])}"
        )
    return lines


def _render_memory(plan: dict[str, Any]) -> list[str]:
    size = plan["world_sizes"][0]["world_size"]
    workers = f"{size} worker{'s' if size > 1 else ''}"
    lines = [f"  ZeRO    weights  gradients  optimizer  activations      total  (estimate, {workers})"]
    for row in _memory_at(plan, size):
        cells = [f"{format_bytes(row[key]):>{width}}" for key, width in _COLUMNS]
        chosen = "  <- this run" if row["stage"] == plan["zero_stage"] else ""
        offloaded = f"  + {format_bytes(row['host_bytes'])} of host" if row["host_bytes"] else ""
        lines.append(f"  {row['stage']:>4}  {'  '.join(cells)}{offloaded}{chosen}")
    return lines


_COLUMNS = (
    ("weights_bytes", 9), ("gradients_bytes", 9), ("optimizer_bytes", 9), ("activations_bytes", 11),
    ("total_bytes", 9),
)  # fmt: skip


def _memory_at(plan: dict[str, Any], world_size: int) -> list[dict[str, Any]]:
    return [row for row in plan["memory"] if row["world_size"] == world_size]
