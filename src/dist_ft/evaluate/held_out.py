"""Measures the held-out sets, and the probe by which exports are checked. Collective; changes no cursor and no RNG.

Shapes: B rows, T tokens, N trained tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

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


@dataclass(frozen=True)
class HeldOutSet:
    """Holds a held-out set.

    Attributes:
        shards: Its rows.
        divisor: `Objective.weight` of all of them.
    """

    shards: TokenShards
    divisor: int


def evaluate(
    module: Engine | nn.Module,
    objective: Objective,
    sets: Mapping[str, HeldOutSet],
    layout: RankLayout,
    device: torch.device,
) -> dict[str, float | None]:
    """Return the objective's numbers over all rows of the sets, then those of each set that has a name.

    The numbers are the same on every rank: the sums of each batch are added up in one order, so that any number of
    ranks gives the same bits. Without a process group, `layout` is that of a single rank.

    Args:
        module: An engine around an `ObjectiveModule`, or the module itself.
        objective: What is measured.
        sets: The sets by name; one alone may have an empty name.
        layout: This rank's part of a batch.
        device: Of the model.

    Returns:
        Number of each metric, of all rows as `eval_loss`, of the rows of a set as `NAME/eval_loss`.
    """

    def total(
        shards: TokenShards, sums: Sums, num_columns: int, step_mean: float = 0.0, is_mismatched: bool = False
    ) -> list[float]:
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

    def numbers_of(sums: Sequence[float], divisor: int) -> dict[str, float | None]:
        numbers = objective.means(names, sums, divisor)
        return numbers | ({"perplexity": perplexity(sums[0] / divisor)} if objective.has_perplexity else {})

    names = objective.eval_names()
    of_sets: dict[str, list[float]] = {}
    averaged = averaged_weights(module) if isinstance(module, Engine) else nullcontext()
    with averaged, inference(module):
        for name, held_out in sets.items():
            shards, step_mean = held_out.shards, 0.0
            if objective.step_sum is not None:
                found = total(shards, objective.step_sum, 1, is_mismatched=objective.adds_mismatched)
                step_mean = found[0] / held_out.divisor
            of_sets[name] = total(shards, objective.eval_sums, len(names), step_mean)
    all_sums = [sum(column) for column in zip(*of_sets.values(), strict=True)]
    numbers = numbers_of(all_sums, sum(held_out.divisor for held_out in sets.values()))
    for name, sums in of_sets.items():
        if name:
            numbers |= {f"{name}/{metric}": value for metric, value in numbers_of(sums, sets[name].divisor).items()}
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
