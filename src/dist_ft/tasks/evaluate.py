"""Generated answers on the held-out conversations: the base model against an export."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from dist_ft.config import Config, config_from_dict
from dist_ft.model.adapter import load_adapter
from dist_ft.model.base import load_model, load_tokenizer
from dist_ft.model.render import Renderer
from dist_ft.records import Conversation, Message
from dist_ft.stream.sources import held_out_rows

_BATCH_ROWS = 32


def exact_match(answer: str, reference: str) -> float:
    """1.0 when the answer is the reference, but for surrounding white space."""
    return float(answer.strip() == reference.strip())


METRICS: dict[str, Callable[[str, str], float]] = {"exact_match": exact_match}


def run(config: dict[str, Any], export_dir: str) -> dict[str, Any]:
    """Measures base model and export on the same rows.

    Returns:
        `{"base": {metric: value}, "tuned": {...}, "samples": [{prompt, reference, base, tuned}], "eval_s"}`.
    """
    parsed = config_from_dict(config)
    began = time.perf_counter()
    tokenizer = load_tokenizer(parsed)
    conversations = _held_out(parsed)
    renderer = Renderer(tokenizer)
    prompts = [renderer.prompt(conversation) for conversation in conversations]
    references = [_last_answer(conversation.messages) for conversation in conversations]
    base_answers, tuned_answers = _answers(parsed, Path(export_dir), tokenizer, prompts)
    samples = [
        {"prompt": _last_question(c.messages), "reference": r, "base": b, "tuned": t}
        for c, r, b, t in list(zip(conversations, references, base_answers, tuned_answers, strict=True))[:3]
    ]
    return {
        "base": _score(parsed, base_answers, references),
        "tuned": _score(parsed, tuned_answers, references),
        "num_rows": len(prompts),
        "samples": samples,
        "eval_s": round(time.perf_counter() - began, 1),
    }


def generate(model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
    """Returns greedy continuations of rendered prompts."""
    tokenizer.padding_side = "left"
    answers: list[str] = []
    for start in range(0, len(prompts), _BATCH_ROWS):
        batch = tokenizer(
            list(prompts[start : start + _BATCH_ROWS]),
            add_special_tokens=False,
            return_tensors="pt",
            padding=True,
        )
        batch.pop("token_type_ids", None)
        with torch.no_grad():
            tokens = model.generate(
                **batch, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
        answers += tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def _answers(config: Config, export_dir: Path, tokenizer: Any, prompts: list[str]) -> tuple[list[str], list[str]]:
    limit = config.eval.max_new_tokens
    if config.method.kind == "lora":
        # One load serves both: PEFT computes the base when its adapter is off.
        model = load_adapter(load_model(config), export_dir).eval()
        with model.disable_adapter():
            base = generate(model, tokenizer, prompts, limit)
        return base, generate(model, tokenizer, prompts, limit)
    base = generate(load_model(config).eval(), tokenizer, prompts, limit)
    tuned_config = config.model_copy(
        update={"model": config.model.model_copy(update={"name": str(export_dir), "revision": None})}
    )
    return base, generate(load_model(tuned_config).eval(), tokenizer, prompts, limit)


def _held_out(config: Config) -> list[Conversation]:
    conversations = (row.record for row in held_out_rows(config.data) if isinstance(row.record, Conversation))
    return [_until_answer(record) for record in islice(conversations, config.eval.max_rows)]


def _until_answer(record: Conversation) -> Conversation:
    last = max(i for i, message in enumerate(record.messages) if message["role"] == "assistant")
    return Conversation(record.messages[: last + 1], record.tools)


def _last_answer(messages: Sequence[Message]) -> str:
    return str(messages[-1]["content"])


def _last_question(messages: Sequence[Message]) -> str:
    return next((str(m["content"]) for m in reversed(messages) if m["role"] == "user"), "")


def _score(config: Config, answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    return {
        name: sum(METRICS[name](a, r) for a, r in zip(answers, references, strict=True)) / len(references)
        for name in config.eval.metrics
    }
