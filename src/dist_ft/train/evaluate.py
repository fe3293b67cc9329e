"""Held-out loss, and the probe by which exports are checked. Collective; touches neither cursor nor any RNG.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from dist_ft.stream.loader import RankLayout, eval_batches
from dist_ft.stream.shards import TokenShards
from dist_ft.train.tensors import to_device

PROBE_TOKENS = 64
PROBE_COLUMNS = 8


def evaluate_loss(engine: Any, shards: TokenShards, layout: RankLayout, num_trained: int) -> float:
    """Returns the mean loss per trained token over the whole split, the same on every rank."""
    total = torch.zeros((), dtype=torch.float64, device=engine.device)
    with _inference(engine):
        for micro in eval_batches(shards, layout):
            total += engine(*to_device(micro, engine.device)).double()
    dist.all_reduce(total)
    return float(total) / num_trained


def probe_inputs(vocab_size: int) -> tuple[list[int], list[int]]:
    """Returns the fixed prompt (64 token ids) and the vocabulary columns that are looked at."""
    tokens = [(7919 * i + 13) % vocab_size for i in range(PROBE_TOKENS)]
    return tokens, [(i * vocab_size) // PROBE_COLUMNS for i in range(PROBE_COLUMNS)]


def probe_logits(engine: Any, vocab_size: int) -> dict[str, Any]:
    """Returns `{tokens, columns, logits [64][8]}` of the model as it computes now."""
    tokens, columns = probe_inputs(vocab_size)
    with _inference(engine):
        logits_BTV = engine(torch.tensor([tokens], device=engine.device), None, None)
    return {"tokens": tokens, "columns": columns, "logits": logits_BTV[0][:, columns].float().cpu().tolist()}


@contextmanager
def _inference(engine: Any) -> Iterator[None]:
    engine.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        engine.train()
