"""Held-out numbers, and the probe by which exports are checked. Collective; touches neither cursor nor any RNG.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from dist_ft.data.stream.loader import RankLayout, eval_batches, num_eval_batches
from dist_ft.data.stream.token_shards import TokenShards
from dist_ft.objectives.micro_batch import to_device
from dist_ft.run.scores import perplexity
from dist_ft.slices import Probe

PROBE_TOKENS = 64
PROBE_COLUMNS = 8


def evaluate(engine: Any, shards: TokenShards, layout: RankLayout, num_trained: int) -> dict[str, float | None]:
    """Returns `{eval_loss, token_accuracy, perplexity}` over the whole split, the same on every rank.

    Each is a mean over the trained tokens of the split. The sums of each batch are added up in one order, so that as
    many ranks as you like give the same numbers.
    """
    with _inference(engine):
        sums = batch_sums(engine, shards, layout, engine.device)
    dist.all_reduce(sums)
    return means(sums, num_trained)


def batch_sums(module: Any, shards: TokenShards, layout: RankLayout, device: torch.device) -> torch.Tensor:
    """Returns loss sum and number of right tokens of each batch [batches, 2]; those of other ranks are zero."""
    sums = torch.zeros(num_eval_batches(shards, layout), 2, dtype=torch.float64, device=device)
    for index, micro in enumerate(eval_batches(shards, layout)):
        found = module(*to_device(micro, device), True)
        place = index * layout.world_size + layout.rank
        if place < len(sums):
            sums[place] = found
    return sums


def means(sums: torch.Tensor, num_trained: int) -> dict[str, float | None]:
    """Returns the numbers of a split from those of its batches."""
    loss_sum, num_correct = sums.cpu().sum(0).tolist()
    loss_mean = loss_sum / num_trained
    return {
        "eval_loss": loss_mean,
        "token_accuracy": num_correct / num_trained,
        "perplexity": perplexity(loss_mean),
    }


def probe_inputs(vocab_size: int) -> tuple[list[int], list[int]]:
    """Returns the fixed prompt (64 token ids) and the vocabulary columns that are looked at."""
    tokens = [(7919 * i + 13) % vocab_size for i in range(PROBE_TOKENS)]
    return tokens, [(i * vocab_size) // PROBE_COLUMNS for i in range(PROBE_COLUMNS)]


def probe_logits(engine: Any, vocab_size: int) -> Probe:
    """Returns the logits [64, 8] of the probe as the model computes now."""
    tokens, columns = probe_inputs(vocab_size)
    with _inference(engine):
        logits_BTV = engine(torch.tensor([tokens], device=engine.device), None, None)
    logits = logits_BTV[0][:, columns].float().cpu().tolist()
    return Probe(tuple(tokens), tuple(columns), tuple(map(tuple, logits)))


@contextmanager
def _inference(engine: Any) -> Iterator[None]:
    engine.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        engine.train()
