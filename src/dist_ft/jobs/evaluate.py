"""Measures finished models on the held-out rows: generated answers and, on request, the loss.

Several tasks may share the work. Each takes whole batches; `evaluate/merge.py` merges their results.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dist_ft.config import Config, with_model_dir
from dist_ft.data.stream.cache import open_split
from dist_ft.evaluate.generate import generate, make_batches
from dist_ft.evaluate.held_out import HeldOutSet, evaluate
from dist_ft.evaluate.merge import AnsweredRow, EvalShare
from dist_ft.evaluate.questions import held_out_questions
from dist_ft.jobs.prepare import prepare_held_out
from dist_ft.jobs.score import score_split
from dist_ft.jobs.splits import with_fraction
from dist_ft.machine import num_cores
from dist_ft.metric_rows import Metrics
from dist_ft.model.adapter import Model, load_adapter
from dist_ft.model.base import load_model, load_tokenizer
from dist_ft.model.chat.render import Renderer
from dist_ft.objectives.kinds import build_objective
from dist_ft.objectives.module import ObjectiveModule
from dist_ft.run.place import local_copy

ADAPTER_CONFIG = "adapter_config.json"


def run(
    config: Config,
    models: dict[str, str | None],
    shard: int = 0,
    num_shards: int = 1,
    num_local: int = 1,
    with_loss: bool = False,
) -> dict[str, Any]:
    """Generate the answers of each model to a share of the questions.

    Args:
        config: Config with the base model and the held-out data.
        models: Name → directory or URL of a model or of an adapter of the base model; None is the base model itself.
        shard: Index of the share, counted from 0.
        num_shards: Number of shares.
        num_local: Tasks of this kind that share a node.
        with_loss: Whether to measure held-out loss, accuracy and perplexity, too.

    Returns:
        An `EvalShare` as JSON values.
    """
    began = time.perf_counter()
    torch.set_num_threads(max(1, num_cores() // num_local))
    config = with_fraction(config)
    tokenizer = load_tokenizer(config)
    questions = held_out_questions(config, Renderer(tokenizer)) if config.eval.metrics else []
    batches = make_batches([len(question.prompt) for question in questions])[shard::num_shards]
    rows: dict[int, AnsweredRow] = {}
    for row in sorted(row for batch in batches for row in batch):
        rows[row] = AnsweredRow(row, questions[row].shown, questions[row].reference, answers={})
    splits = prepare_held_out(config, tokenizer) if with_loss else {}
    splits = {name: score_split(config, split) for name, split in splits.items()}
    objective = build_objective(config.objective)
    numbers: dict[str, Metrics] = {}
    with ExitStack() as stack:
        is_asked = bool(batches) or bool(splits)
        copies = {name: stack.enter_context(local_copy(m)) if m else None for name, m in models.items() if is_asked}
        for name, model in _each(config, copies):
            if splits:
                layout = objective.layout(0, 1, config.train.micro_batch_size, config.data.packing)
                sets = {
                    of: HeldOutSet(open_split(split, config.data.loader), objective.weight(split.totals))
                    for of, split in splits.items()
                }
                numbers[name] = evaluate(ObjectiveModule(model).eval(), objective, sets, layout, model.device)
            for batch in batches:
                prompts = [questions[row].prompt for row in batch]
                answers = generate(model, tokenizer, prompts, config.eval.max_new_tokens)
                for row, answer in zip(batch, answers, strict=True):
                    rows[row].answers[name] = answer.text
            del model  # before the next one is loaded
    return asdict(EvalShare(tuple(rows.values()), numbers, round(time.perf_counter() - began, 1)))


def _each(config: Config, models: Mapping[str, Path | None]) -> Iterator[tuple[str, Model]]:
    """Yield the models one by one; a base model is loaded once for itself and all its adapters."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_base = {name: path for name, path in models.items() if path is None or (path / ADAPTER_CONFIG).is_file()}
    if on_base:
        base = load_model(config).eval().to(device)
        for name, path in on_base.items():
            if path is None:
                yield name, base
                continue
            adapted = load_adapter(base, path).eval()
            yield name, adapted
            base = adapted.unload()
        del base
    for name, path in models.items():
        if path is not None and name not in on_base:
            yield name, load_model(with_model_dir(config, str(path))).eval().to(device)
