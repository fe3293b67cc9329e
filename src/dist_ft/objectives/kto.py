"""KTO: answers with a label each, good or bad, instead of pairs. Names and formulas are TRL's.

A slot holds a row's answer and, behind it, the row's prompt with the answer of the row before in the token shard: the
mismatched answer. Its log-ratio, averaged over the global step, is z, below which a good answer is not good enough. A
forward pass over the whole step measures it before the first backward pass, so that z does not depend on which rows
share a pass.

Shapes: R rows of the data in the micro batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from dist_ft.config.training_sections import KtoConfig
from dist_ft.data.shards.columns import Column
from dist_ft.errors import DataError
from dist_ft.model.chat.render import Renderer
from dist_ft.objectives.objective import Objective, Outputs, Rows
from dist_ft.objectives.preference import REFERENCE, answer_logps, reference_scorer
from dist_ft.records import Labelled, Record, Sample

LABEL = Column("label")
"""1 for a good answer, 0 for a bad one."""

METRICS = (
    "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "kl", "labels/chosen", "labels/rejected",
)  # fmt: skip
DIVIDED_BY = {f"{name}/{side}": f"labels/{side}" for name in ("rewards", "logps") for side in ("chosen", "rejected")}


def render(records: Sequence[Record], renderer: Renderer) -> list[list[Sample] | DataError]:
    """Renders each answer with its label."""
    rendered = iter(renderer.answers([record.side() for record in records if isinstance(record, Labelled)]))
    return [_labelled(record, next(rendered)) if isinstance(record, Labelled) else _other(record) for record in records]


def _labelled(record: Labelled, sample: Sample | DataError) -> list[Sample] | DataError:
    if isinstance(sample, DataError):
        return sample
    return [replace(sample, numbers={LABEL.name: float(record.label)})]


def _other(record: Record) -> DataError:
    return DataError(
        f"the row is {record.kind}, but objective.kind=kto learns from answers with a label; add `label: true` or "
        f"`false` to the row, or set objective.kind ({record.objectives})"
    )


def kto(config: KtoConfig) -> Objective:
    """Returns KTO with the settings of its section."""
    samples = 2 if config.loss == "kto" else 1

    def differences(outputs: Outputs, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the log-probability of each answer, and its difference to the reference [R, samples]."""
        (logps_S,) = answer_logps(outputs, rows)
        return logps_S.view(-1, samples), (logps_S - rows.column(REFERENCE)).view(-1, samples)

    def loss(outputs: Outputs, rows: Rows) -> torch.Tensor:
        logps, deltas = differences(outputs, rows)
        logps_R, delta_R = logps[:, 0], deltas[:, 0]
        good_R = rows.column(LABEL).view(-1, samples)[:, 0]
        bad_R = 1 - good_R
        z = max(0.0, rows.step_mean)
        loss_good_R = config.desirable_weight * (1 - torch.sigmoid(config.beta * (delta_R - z)))
        loss_bad_R = config.undesirable_weight * (1 - torch.sigmoid(config.beta * (z - delta_R)))
        rewards_R, logps_R = config.beta * delta_R.detach(), logps_R.detach()
        numbers = [
            loss_good_R * good_R + loss_bad_R * bad_R,
            rewards_R * good_R, rewards_R * bad_R, logps_R * good_R, logps_R * bad_R,
            torch.full_like(good_R, z), good_R, bad_R,
        ]  # fmt: skip
        return torch.stack([number.sum() for number in numbers])

    def mismatched(outputs: Outputs, rows: Rows) -> torch.Tensor:
        return differences(outputs, rows)[1][:, 1].sum().reshape(1)

    return Objective(
        kind=config.kind,
        render=render,
        weight=lambda totals: totals.num_samples // samples,
        loss=loss,
        metrics=METRICS,
        divided_by=DIVIDED_BY,
        differences={"rewards/margins": ("rewards/chosen", "rewards/rejected")},
        step_sum=mismatched if config.loss == "kto" else None,
        rows_per_slot=samples,
        sample_names=("answer", "mismatched answer")[:samples],
        columns=(LABEL.name,),
        adds_mismatched=config.loss == "kto",
        scorer=reference_scorer(config.reference),
        render_key=" kto",
    )
