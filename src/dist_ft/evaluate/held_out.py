"""Measures the held-out split, and the probe by which exports are checked. Collective; changes no cursor and no RNG.

Shapes: B rows, T tokens, N trained tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import nn

from dist_ft.data.stream.loader import RankLayout, eval_batches, num_eval_batches
from dist_ft.data.stream.token_shards import TokenShards
from dist_ft.objectives.objective import Objective, Outputs, Rows, Sums
from dist_ft.run.scores import perplexity
from dist_ft.slices import Probe
from dist_ft.zero.engine import Engine
from dist_ft.zero.partitions import averaged_weights

PROBE_TOKENS = 64
PROBE_COLUMNS = 8


def evaluate(
    module: Engine | nn.Module,
    objective: Objective,
    shards: TokenShards,
    layout: RankLayout,
    divisor: int,
    device: torch.device,
) -> dict[str, float | None]:
    """Return the objective's numbers over a whole split, the same on every rank.

    The sums of each batch are added up in one order, so that any number of ranks gives the same bits. Without a
    process group, `layout` is that of a single rank.

    Args:
        module: An engine around an `ObjectiveModule`, or the module itself.
        objective: What is measured.
        shards: The split.
        layout: This rank's part of it.
        divisor: `Objective.weight` of the whole split.
        device: Of the model.
    """

    def total(sums: Sums, num_columns: int, step_mean: float = 0.0, is_mismatched: bool = False) -> list[float]:
        of_batches = torch.zeros(num_eval_batches(shards, layout), num_columns, dtype=torch.float64, device=device)
        for index, micro in enumerate(eval_batches(shards, layout, is_mismatched)):
            found = module(Rows.of(micro, device, step_mean), sums)
            number = index * layout.world_size + layout.rank
            if number < len(of_batches):
                of_batches[number] = found
        if layout.world_size > 1:
            dist.all_reduce(of_batches)
        totals: list[float] = of_batches.cpu().sum(0).tolist()
        return totals

    names = objective.eval_names()
    averaged = averaged_weights(module) if isinstance(module, Engine) else nullcontext()
    with averaged, inference(module):
        step_mean = 0.0
        if objective.step_sum is not None:
            step_mean = total(objective.step_sum, 1, is_mismatched=objective.adds_mismatched)[0] / divisor
        sums = total(objective.eval_sums, len(names), step_mean)
    numbers = objective.means(names, sums, divisor)
    if objective.has_perplexity:
        numbers["perplexity"] = perplexity(sums[0] / divisor)
    return numbers


def probe_inputs(vocab_size: int) -> tuple[list[int], list[int]]:
    """Return the fixed prompt (64 token ids) and the vocabulary columns that are looked at."""
    tokens = [(7919 * i + 13) % vocab_size for i in range(PROBE_TOKENS)]
    return tokens, [(i * vocab_size) // PROBE_COLUMNS for i in range(PROBE_COLUMNS)]


def probe_logits(engine: Engine, vocab_size: int) -> Probe:
    """Return the logits [64, 8] of the probe as the model computes now."""
    tokens, columns = probe_inputs(vocab_size)
    ids_BT = torch.tensor([tokens], device=engine.device)
    with averaged_weights(engine), inference(engine):
        # Every token is a target, so that the output layer sees them all.
        slots_B = torch.zeros(1, device=engine.device)
        logits_NV = engine(Rows(ids_BT, ids_BT, None, slots_B, torch.zeros_like(ids_BT)), _logits)
    logits = logits_NV[:, columns].cpu().tolist()
    return Probe(tuple(tokens), tuple(columns), tuple(map(tuple, logits)))


def _logits(outputs: Outputs, rows: Rows) -> torch.Tensor:
    return outputs.logits_NV


@contextmanager
def inference(module: Engine | nn.Module) -> Iterator[None]:
    """Switches dropout and gradients off inside the block."""
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(was_training)
