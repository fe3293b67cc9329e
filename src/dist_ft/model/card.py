"""Writes the model card of an export. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping

from dist_ft.config import Config
from dist_ft.metric_rows import Metrics
from dist_ft.model.base import quantisation_of
from dist_ft.model.trained import trains_adapter


def model_card(
    config: Config,
    step: int,
    versions: dict[str, str],
    loss: float | None,
    held_out: Mapping[int, Metrics],
    merged: bool,
    base_name: str | None = None,
) -> str:
    """Return the README.md of an export: what it is, data, method, numbers, versions.

    Args:
        config: Config of the run.
        step: Completed steps of the checkpoint.
        versions: Versions of packages by name.
        loss: Training loss of the step; None if it is not known.
        held_out: Held-out numbers of each evaluated step.
        merged: Whether the adapter was merged into the base model.
        base_name: Name of the base model for others; default is `model.name`.
    """
    base_model = base_name or config.model.name
    is_adapter = trains_adapter(config) and not merged
    # JSON strings are valid YAML scalars, whatever a name holds.
    header = [
        "---",
        f"base_model: {json.dumps(base_model)}",
        f"library_name: {'peft' if is_adapter else 'transformers'}",
        "pipeline_tag: text-generation",
        "tags: [dist-ft]",
        "---",
    ]
    commit = f" at commit `{config.model.commit}`" if config.model.commit and base_name is None else ""
    kind = "LoRA adapter" if is_adapter else "merged model" if merged else "fully fine-tuned model"
    rows = [] if loss is None else [f"| {step} | training | {loss:.4f} |"]
    shown = {"eval_loss": "held out", "rewards/accuracies": "held-out accuracy", "rewards/margins": "held-out margin"}
    of_sets = {f"{name}/{key}": f"{label}: {name}" for name in config.data.eval_names for key, label in shown.items()}
    rows += [
        f"| {at} | {label} | {value:.4f} |"
        for at, metrics in sorted(held_out.items())
        for name, label in (shown | of_sets).items()
        if at <= step and (value := metrics.get(name)) is not None
    ]
    quantised = quantisation_of(config)
    base = f", on a base in `{json.dumps(quantised.model_dump(mode='json'))}`" if quantised else ""
    sections = {
        "Data": [
            *[f"- `{source.source}`" for source in config.data.train],
            f"- held out: `{config.data.eval}`",
        ],
        "Method": [
            f"- objective: `{json.dumps(config.objective.model_dump(mode='json'))}`",
            f"- method: `{json.dumps(config.method.model_dump(mode='json'))}`",
            f"- optimizer: {config.optimizer.title} `{json.dumps(config.optimizer.model_dump(mode='json'))}`",
            f"- schedule: `{config.schedule.kind}`, seed {config.run.seed}",
            f"- batch: {config.train.global_batch_size} sequences of up to {config.data.seq_len} tokens",
            f"- dtype: {config.model.torch_dtype} with float32 masters{base}",
        ],
        "Results": ["| step | number | value |", "|---|---|---|", *rows],
        "Versions": [f"- {name} {number}" for name, number in sorted(versions.items())],
    }
    sentence = f"A {kind} of `{base_model}`{commit}, trained with dist-ft for {step} steps."
    body = [f"# {config.run.name}", "", sentence, ""]
    for title, lines in sections.items():
        body += [f"## {title}", "", *lines, ""]
    return "\n".join([*header, "", *body])
