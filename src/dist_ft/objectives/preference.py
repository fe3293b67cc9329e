"""Preference tuning on pairs: DPO and its relatives, CPO and SimPO, ORPO. Names and formulas are TRL's.

Every number is a sum over pairs, divided by the pairs of the step. The cross entropy that some losses add is a mean per
token of each answer, not of the micro batch. So nothing depends on which pairs share a pass (docs/objectives.md).

Shapes: N trained tokens of the micro batch, G pairs; an axis of 2 holds (chosen, rejected).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch.nn import functional as F

from dist_ft.config.training_sections import CpoConfig, DpoConfig, OrpoConfig
from dist_ft.data.shards.columns import Column
from dist_ft.errors import DataError
from dist_ft.model.chat.render import Renderer
from dist_ft.objectives.objective import Objective, Outputs, Rows, Scorer
from dist_ft.records import ANSWER_START, Preference, Record, Sample
from dist_ft.slots import SlotTotals

REFERENCE = Column("ref_logps")
"""Log-probability of each answer by the reference."""
BORDERS = Column(ANSWER_START)

PAIR_METRICS = (
    "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected",
)  # fmt: skip
SFT_METRICS = (*PAIR_METRICS, "nll_loss")


class Pairs(NamedTuple):
    """Pairs of a micro batch: the log-probability of each answer, and its tokens."""

    logps_G2: torch.Tensor
    counts_G2: torch.Tensor

    @property
    def means_G2(self) -> torch.Tensor:
        """The log-probability of each answer per token."""
        return self.logps_G2 / self.counts_G2


def token_logps(outputs: Outputs) -> torch.Tensor:
    """Return the log-probability of each trained token [N]."""
    return -F.cross_entropy(outputs.logits_NV, outputs.targets_N, reduction="none")


def answer_logps(outputs: Outputs, rows: Rows) -> tuple[torch.Tensor]:
    """Return the log-probability of each sample's answer [S]; what the reference writes down."""
    return (rows.sample_sums(token_logps(outputs)),)


def reference_scorer(reference: str | None) -> Scorer:
    """Return what the reference model writes down of each answer."""
    return Scorer((REFERENCE,), answer_logps, reference, "objective.reference")


def pairs_of(outputs: Outputs, rows: Rows) -> Pairs:
    """Return the pairs of a micro batch, of which answers alone are trained."""
    logps_N = token_logps(outputs)
    logps_S, counts_S = rows.sample_sums(logps_N), rows.sample_sums(torch.ones_like(logps_N))
    return Pairs(logps_S.view(-1, 2), counts_S.view(-1, 2))


def weight(totals: SlotTotals) -> int:
    """Return the pairs, so that each counts alike."""
    return totals.num_samples // 2


def render(records: Sequence[Record], renderer: Renderer) -> list[list[Sample] | DataError]:
    """Render each pair as (chosen, rejected); the answers are trained."""
    pairs = [record.sides() if isinstance(record, Preference) else None for record in records]
    rendered = iter(renderer.answers([side for pair in pairs for side in pair or ()]))
    return [
        _other(record) if pair is None else _joined(next(rendered), next(rendered))
        for record, pair in zip(records, pairs, strict=True)
    ]


def _other(record: Record) -> DataError:
    return DataError(
        f"the row is {record.kind}, but this objective learns from pairs of answers; give the row both answers "
        f"(`chosen` and `rejected`), or set objective.kind ({record.objectives})"
    )


def _joined(chosen: Sample | DataError, rejected: Sample | DataError) -> list[Sample] | DataError:
    if isinstance(chosen, DataError):
        return DataError(f"the chosen answer: {chosen}")
    if isinstance(rejected, DataError):
        return DataError(f"the rejected answer: {rejected}")
    return [chosen, rejected]


def _sums(
    loss_G: torch.Tensor, rewards_G2: torch.Tensor, logps_G2: torch.Tensor, *others_G: torch.Tensor
) -> torch.Tensor:
    """Return the loss and the metrics, added up."""
    rewards, logps = rewards_G2.detach(), logps_G2.detach()
    margins = rewards[:, 0] - rewards[:, 1]
    numbers = [*rewards.unbind(1), margins, (margins > 0).to(margins.dtype), *logps.unbind(1)]
    return torch.stack([number.sum() for number in (loss_G, *numbers, *(other.detach() for other in others_G))])


def _sigmoid(h: torch.Tensor) -> torch.Tensor:
    return -F.logsigmoid(h)


def dpo(config: DpoConfig) -> Objective:
    """Return DPO with the settings of its section."""
    beta, epsilon = config.beta, config.label_smoothing

    def robust(h: torch.Tensor) -> torch.Tensor:
        return ((1 - epsilon) * _sigmoid(h) - epsilon * _sigmoid(-h)) / (1 - 2 * epsilon)

    # Of the differences to the reference [G, 2], summed over tokens and as means of tokens.
    losses: Mapping[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
        "sigmoid": lambda sums, means: _sigmoid(beta * (sums[:, 0] - sums[:, 1])),
        "robust": lambda sums, means: robust(beta * (sums[:, 0] - sums[:, 1])),
        "hinge": lambda sums, means: torch.relu(1 - beta * (sums[:, 0] - sums[:, 1])),
        "ipo": lambda sums, means: (means[:, 0] - means[:, 1] - 1 / (2 * beta)) ** 2,
        "sigmoid_norm": lambda sums, means: _sigmoid(beta * (means[:, 0] - means[:, 1])),
        "apo_zero": lambda sums, means: 1 - torch.sigmoid(beta * sums[:, 0]) + torch.sigmoid(beta * sums[:, 1]),
        "apo_down": lambda sums, means: torch.sigmoid(beta * sums[:, 0])
        + 1 - torch.sigmoid(beta * (sums[:, 0] - sums[:, 1])),
    }  # fmt: skip
    of_pair = losses[config.loss]

    def loss(outputs: Outputs, rows: Rows) -> torch.Tensor:
        pairs = pairs_of(outputs, rows)
        deltas_G2 = pairs.logps_G2 - rows.column(REFERENCE).view(-1, 2)
        loss_G = of_pair(deltas_G2, deltas_G2 / pairs.counts_G2)
        if config.sft_weight:
            loss_G = loss_G - config.sft_weight * pairs.means_G2[:, 0]
        return _sums(loss_G, beta * deltas_G2, pairs.logps_G2)

    return _objective(config.kind, loss, PAIR_METRICS, reference_scorer(config.reference))


def cpo(config: CpoConfig) -> Objective:
    """Return CPO or SimPO with the settings of its section."""

    def loss(outputs: Outputs, rows: Rows) -> torch.Tensor:
        pairs = pairs_of(outputs, rows)
        compared_G2 = pairs.means_G2 if config.loss == "simpo" else pairs.logps_G2
        margin = config.gamma if config.loss == "simpo" else 0.0
        nll_G = -pairs.means_G2[:, 0]
        loss_G = _sigmoid(config.beta * (compared_G2[:, 0] - compared_G2[:, 1]) - margin) + config.sft_weight * nll_G
        return _sums(loss_G, config.beta * compared_G2, compared_G2, nll_G)

    return _objective(config.kind, loss, SFT_METRICS, None)


def orpo(config: OrpoConfig) -> Objective:
    """Return ORPO with the settings of its section. Its cross entropy covers the prompt, as TRL's does."""

    def loss(outputs: Outputs, rows: Rows) -> torch.Tensor:
        logps_N = token_logps(outputs)
        # Places of trained tokens, counted from 0 in each sample; the token that is predicted stands one behind.
        samples_N = rows.samples_BT[rows.is_trained_BT]
        is_answer_N = rows.places_BT[rows.is_trained_BT] + 1 >= rows.column(BORDERS)[samples_N]
        counts_S = rows.sample_sums(is_answer_N.to(logps_N.dtype))
        means_G2 = (rows.sample_sums(logps_N * is_answer_N) / counts_S).view(-1, 2)
        nll_G = -(rows.sample_sums(logps_N) / rows.sample_sums(torch.ones_like(logps_N))).view(-1, 2)[:, 0]
        odds_G2 = means_G2 - _log1mexp(means_G2)
        loss_G = nll_G + config.beta * _sigmoid(odds_G2[:, 0] - odds_G2[:, 1])
        return _sums(loss_G, config.beta * means_G2, means_G2, nll_G)

    objective = _objective(config.kind, loss, SFT_METRICS, None)
    return replace(objective, render=_render_with_prompt, columns=(ANSWER_START,), render_key=" orpo")


def _log1mexp(x: torch.Tensor) -> torch.Tensor:
    """Return log(1 - exp(x)) for x < 0, by the form that is exact where x is."""
    # The branch that is not taken must not give NaN: its gradient would, too.
    near, far = torch.clamp(x, min=-0.6931472), torch.clamp(x, max=-0.6931472)
    return torch.where(x > -0.6931472, torch.log(-torch.expm1(near)), torch.log1p(-torch.exp(far)))


def _render_with_prompt(records: Sequence[Record], renderer: Renderer) -> list[list[Sample] | DataError]:
    """Render each pair; of the chosen sample the prompt is trained, too, and the border is kept as a number."""
    return [
        [_with_border(pair[0], True), _with_border(pair[1], False)] if isinstance(pair, list) else pair
        for pair in render(records, renderer)
    ]


def _with_border(sample: Sample, trains_prompt: bool) -> Sample:
    border = sample.trained.index(True) if any(sample.trained) else len(sample.trained)
    trained = [place > 0 for place in range(len(sample.trained))] if trains_prompt else sample.trained
    return Sample(sample.input_ids, trained, {ANSWER_START: border})


def _objective(
    kind: str, loss: Callable[[Outputs, Rows], torch.Tensor], metrics: tuple[str, ...], scorer: Scorer | None
) -> Objective:
    return Objective(
        kind=kind, render=render, weight=weight, loss=loss, metrics=metrics, rows_per_slot=2, scorer=scorer,
        sample_names=("chosen", "rejected"),
        render_key=" pairs",
    )  # fmt: skip
