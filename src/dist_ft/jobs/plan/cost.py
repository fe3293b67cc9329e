"""Estimates the cost of a run on measured data: steps, epochs, tokens, and arithmetic operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dist_ft.config import Config
from dist_ft.data.stream.mixing import counts_before, epoch_size, rates_of
from dist_ft.jobs.data_report.measure import SplitCounts
from dist_ft.jobs.plan.planned import Cost
from dist_ft.jobs.prepare import plan_length
from dist_ft.memory import ModelShape
from dist_ft.model.base import skeleton
from dist_ft.model.trained import model_shape, select_trained
from dist_ft.zero.optimizers import optimizer_of


def trained_shape(config: Config) -> ModelShape:
    """Return the shape of the model with its trained part; load no weight.

    Raises:
        UserError: The model does not exist, or the adapter does not fit it.
    """
    shape = model_shape(select_trained(skeleton(config), config), config)
    return replace(shape, state_bytes=optimizer_of(config.optimizer).state_bytes)


def estimate_cost(config: Config, splits: Sequence[SplitCounts], shape: ModelShape) -> Cost | None:
    """Return the cost of a run; None if a source has no sequence, so that no run is possible."""
    trained_on = [split for split in splits if split.name != "eval"]
    counts = [split.num_sequences for split in trained_on]
    if not all(counts):
        return None
    steps, positions = plan_length(config, counts)
    weights = config.data.weights
    used = counts_before(positions, rates_of(weights) if weights else counts)
    epoch = epoch_size(counts, weights, config.data.exhaust)
    tokens, trained = (
        round(sum(taken * total / count for taken, total, count in zip(used, totals, counts, strict=True)))
        for totals in (
            [split.num_tokens for split in trained_on], [split.num_trained_tokens for split in trained_on],
        )
    )  # fmt: skip
    return Cost(
        steps=steps,
        epochs=round(positions / epoch, 4) if epoch else None,
        passes=tuple(round(taken / count, 4) for taken, count in zip(used, counts, strict=True)),
        sequences=positions,
        tokens=tokens,
        trained_tokens=trained,
        params=shape.num_params,
        trained_params=shape.num_trained,
        flops=flops(shape.num_params, shape.num_trained, tokens),
    )


def flops(num_params: int, num_trained: int, tokens: int) -> int:
    """Return 6 operations per trained parameter and token (Kaplan et al. 2020), and 4 per frozen parameter and token.

    The token-by-token products of attention, padding and recomputation are not counted.
    """
    return (4 * num_params + 2 * num_trained) * tokens
