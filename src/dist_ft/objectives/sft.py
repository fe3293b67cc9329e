"""Supervised fine-tuning: the cross entropy of the trained tokens of conversations and texts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from dist_ft.errors import DataError
from dist_ft.model.chat.render import Renderer
from dist_ft.objectives.objective import Objective, Outputs, Rows
from dist_ft.records import Record, Sample
from dist_ft.slots import SlotTotals


def loss(outputs: Outputs, rows: Rows) -> torch.Tensor:
    """Return the cross entropy summed over trained tokens [1]."""
    return F.cross_entropy(outputs.logits_NV, outputs.targets_N, reduction="sum").reshape(1)


def token_accuracy(outputs: Outputs, rows: Rows) -> torch.Tensor:
    """Return for how many trained tokens the likeliest one is the right one."""
    return (outputs.logits_NV.argmax(-1) == outputs.targets_N).sum()


def render(records: Sequence[Record], renderer: Renderer) -> list[list[Sample] | DataError]:
    """Render each record as the chat template has it."""
    return renderer.render_many(records)


def weight(totals: SlotTotals) -> int:
    """Return the trained tokens, so that each counts alike, in a long row or a short one."""
    return totals.num_trained_tokens


SFT = Objective(
    kind="sft",
    render=render,
    weight=weight,
    loss=loss,
    # The likeliest of all tokens costs a pass over the logits, which no step should take.
    eval_metrics={"token_accuracy": token_accuracy},
    has_perplexity=True,
)
