"""Generates answers to many prompts, in batches that do not depend on the number of tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from dist_ft.model.adapter import Model
from dist_ft.model.base import Tokenizer, stop_tokens

_BATCH_ROWS = 32
_WINDOW_ROWS = 8 * _BATCH_ROWS
"""Rows that are sorted by length before they are cut into batches: less padding, the same batches for a longer file."""


class Generated(NamedTuple):
    """A continuation.

    Attributes:
        text: Without special tokens.
        is_whole: Whether it came to the end of the turn.
    """

    text: str
    is_whole: bool


def make_batches(lengths: Sequence[int]) -> list[list[int]]:
    """Return the rows of each batch; the same for any number of tasks, so that the answers are, too.

    Args:
        lengths: Characters of each prompt.
    """
    batches = []
    for first in range(0, len(lengths), _WINDOW_ROWS):
        window = range(first, min(first + _WINDOW_ROWS, len(lengths)))
        ordered = sorted(window, key=lambda row: (lengths[row], row))
        batches += [ordered[at : at + _BATCH_ROWS] for at in range(0, len(ordered), _BATCH_ROWS)]
    return batches


def generate(
    model: Model, tokenizer: Tokenizer, prompts: Sequence[str], max_new_tokens: int, temperature: float = 0.0
) -> list[Generated]:
    """Return the continuations of one batch of rendered prompts, up to the end of the turn.

    A prompt that leaves no room for an answer loses its beginning.

    Args:
        model: The model, ready for inference.
        tokenizer: Its tokenizer.
        prompts: Rendered prompts.
        max_new_tokens: Longest continuation.
        temperature: 0 takes the likeliest token each time; otherwise torch's generator draws.
    """
    tokenizer.padding_side = tokenizer.truncation_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # Some models name no limit, some say -1.
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = max(1, limit - max_new_tokens) if limit is not None and limit > 0 else None
    batch = tokenizer(
        list(prompts),
        add_special_tokens=False,
        return_tensors="pt",
        padding=True,
        truncation=room is not None,
        max_length=room,
    ).to(model.device)
    batch.pop("token_type_ids", None)
    stops = sorted(stop_tokens(tokenizer, model.generation_config))
    drawn: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    with torch.no_grad():
        tokens = model.generate(
            **batch,
            **(drawn if temperature else {"do_sample": False}),
            max_new_tokens=max_new_tokens,
            eos_token_id=stops,
            pad_token_id=tokenizer.pad_token_id,
        )[:, batch["input_ids"].shape[1] :]
    is_whole = torch.isin(tokens, torch.tensor(stops, device=tokens.device)).any(1).tolist()
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [Generated(*found) for found in zip(texts, is_whole, strict=True)]
