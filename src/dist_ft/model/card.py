"""The model card of an export: pure text."""

from __future__ import annotations

import json
from typing import Any

from dist_ft.config import Config
from dist_ft.model.trained import trains_adapter


def model_card(
    config: Config,
    step: int,
    versions: dict[str, str],
    metrics: dict[str, Any],
    evals: dict[int, dict[str, Any]],
    merged: bool,
) -> str:
    """Returns README.md of an export: what it is, data, method, numbers, versions."""
    is_adapter = trains_adapter(config) and not merged
    # JSON strings are valid YAML scalars, whatever a name holds.
    header = [
        "---",
        f"base_model: {json.dumps(config.model.name)}",
        f"library_name: {'peft' if is_adapter else 'transformers'}",
        "pipeline_tag: text-generation",
        "tags: [dist-ft]",
        "---",
    ]
    commit = f" at commit `{config.model.commit}`" if config.model.commit else ""
    kind = "LoRA adapter" if is_adapter else "merged model" if merged else "fully fine-tuned model"
    body = [
        f"# {config.run.name}",
        "",
        f"A {kind} of `{config.model.name}`{commit}, trained with dist-ft for {step} steps.",
        "",
        "## Data",
        "",
        *[f"- `{source.source}`" for source in config.data.train],
        f"- held out: `{config.data.eval}`",
        "",
        "## Method",
        "",
        f"- method: `{json.dumps(config.method.model_dump(mode='json'))}`",
        f"- optimizer: AdamW `{json.dumps(config.optimizer.model_dump(mode='json'))}`",
        f"- schedule: `{config.schedule.kind}`, seed {config.run.seed}",
        f"- batch: {config.train.global_batch_size} sequences of up to {config.data.seq_len} tokens",
        f"- dtype: {config.model.torch_dtype} with float32 masters",
        "",
        "## Results",
        "",
        *_results(step, metrics, evals),
        "",
        "## Versions",
        "",
        *[f"- {name} {number}" for name, number in sorted(versions.items())],
        "",
    ]
    return "\n".join([*header, "", *body])


def _results(step: int, metrics: dict[str, Any], evals: dict[int, dict[str, Any]]) -> list[str]:
    held_out = sorted((at, row) for at, row in evals.items() if row.get("eval_loss") is not None)
    rows = ["| step | loss | value |", "|---|---|---|"]
    if metrics.get("loss") is not None:
        rows.append(f"| {step} | training | {metrics['loss']:.4f} |")
    rows += [f"| {at} | held out | {row['eval_loss']:.4f} |" for at, row in held_out if at <= step]
    return rows
