"""KTO: answers with a label each, good or bad, instead of pairs. Names and formulas are TRL's.

A slot holds a row's answer and, behind it, the row's prompt with the answer of the row before in the token shard: the
mismatched answer. Its log-ratio, averaged over the global step, is z, below which a good answer is not good enough. A
forward pass over the whole step measures it before the first backward pass, so that z does not depend on which rows
share a pass.

Shapes: S answers of the micro batch.
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
    """Render each answer with its label."""
    sides = [side for record in records if isinstance(record, Labelled) for side in record.sides()]
    rendered = iter(renderer.answers(sides))
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
    """Return KTO with the settings of its section."""
    has_z = config.loss == "kto"

    def loss(outputs: Outputs, rows: Rows) -> torch.Tensor:
        (logps_S,) = answer_logps(outputs, rows)
        delta_S, good_S = logps_S - rows.column(REFERENCE), rows.column(LABEL)
        bad_S = 1 - good_S
        z = max(0.0, rows.step_mean)
        loss_good_S = config.desirable_weight * (1 - torch.sigmoid(config.beta * (delta_S - z)))
        loss_bad_S = config.undesirable_weight * (1 - torch.sigmoid(config.beta * (z - delta_S)))
        rewards_S, logps_S = config.beta * delta_S.detach(), logps_S.detach()
        numbers = [
            loss_good_S * good_S + loss_bad_S * bad_S,
            rewards_S * good_S, rewards_S * bad_S, logps_S * good_S, logps_S * bad_S,
            torch.full_like(good_S, z), good_S, bad_S,
        ]  # fmt: skip
        return torch.stack([number.sum() for number in numbers])

    def mismatched(outputs: Outputs, rows: Rows) -> torch.Tensor:
        return (answer_logps(outputs, rows)[0] - rows.column(REFERENCE)).sum().reshape(1)

    samples = 2 if has_z else 1
    return Objective(
        kind=config.kind,
        render=render,
        weight=lambda totals: totals.num_samples // samples,
        loss=loss,
        metrics=METRICS,
        divided_by=DIVIDED_BY,
        differences={"rewards/margins": ("rewards/chosen", "rewards/rejected")},
        step_sum=mismatched if has_z else None,
        rows_per_slot=samples,
        sample_names=("answer", "mismatched answer")[:samples],
        columns=(LABEL.name,),
        adds_mismatched=has_z,
        scorer=reference_scorer(config.reference),
        render_key=" kto",
    )
