"""Distillation: a student learns the teacher's distribution over the trained tokens (Hinton et al. 2015).

The teacher never runs beside the student. A task writes its `top_k` likeliest tokens of each trained place with their
log-probabilities, and one bucket for all the others together (`jobs/score.py`). The student's probabilities fall into
the same buckets, so a divergence of buckets is compared with the whole vocabulary, not with k tokens of it. With
`top_k` at the size of the vocabulary there is no bucket, and the divergence is the plain one.

Shapes: N trained tokens of the micro batch, V vocabulary, K likeliest tokens of the teacher.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.nn import functional as F

from dist_ft.config.training_sections import DistillConfig
from dist_ft.data.shards.columns import Column
from dist_ft.objectives import sft
from dist_ft.objectives.objective import Objective, Outputs, Rows, Scorer

_FLOOR = -1e4
"""Log-probability that stands for none; float16 holds it."""


def distill(config: DistillConfig) -> Objective:
    """Return distillation with the settings of its section. Render and weight are those of supervised fine-tuning."""
    # An entry more than tokens: the bucket of the others.
    logps = Column("teacher_logps", "token", "float16", config.top_k + 1)
    tokens = Column("teacher_tokens", "token", "int32", config.top_k)
    divergence, temperature = _DIVERGENCES[config.divergence], config.temperature

    def score(outputs: Outputs, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        tokens_NK = outputs.logits_NV.topk(config.top_k).indices
        logps_NK = bucket_logps(outputs.logits_NV / temperature, tokens_NK)
        return F.pad(logps_NK, (0, config.top_k + 1 - logps_NK.shape[1]), value=_FLOOR), tokens_NK

    def loss(outputs: Outputs, rows: Rows) -> torch.Tensor:
        teacher, student = _compared(outputs, rows)
        apart = divergence(teacher, student).sum()
        with torch.set_grad_enabled(torch.is_grad_enabled() and config.ce_weight > 0):
            nll = sft.loss(outputs, rows)[0]
        total = temperature**2 * apart + (config.ce_weight * nll if config.ce_weight else 0.0)
        kl = apart if config.divergence == "forward" else forward_kl(teacher, student.detach()).sum()
        return torch.stack([total, kl.detach(), nll.detach()])

    def _compared(outputs: Outputs, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the log-probabilities of the buckets, the teacher's and the student's."""
        tokens_NK, stored = rows.column(tokens).long(), rows.column(logps).float()
        # A teacher of the same tokens may have a longer embedding, whose further rows mean nothing.
        is_token_NK = tokens_NK < outputs.logits_NV.shape[1]
        student = bucket_logps(outputs.logits_NV / temperature, tokens_NK, is_token_NK)
        teacher = torch.cat([stored[:, :-1].masked_fill(~is_token_NK, _FLOOR), stored[:, -1:]], dim=1)
        # Rounded to float16 they no longer add up to 1.
        return torch.log_softmax(teacher[:, : student.shape[1]], dim=1).clamp(min=_FLOOR), student

    def agreement(outputs: Outputs, rows: Rows) -> torch.Tensor:
        return (outputs.logits_NV.argmax(1) == rows.column(tokens)[:, 0]).sum()

    return Objective(
        kind=config.kind,
        render=sft.render,
        weight=sft.weight,
        loss=loss,
        metrics=("kl", "nll_loss"),
        eval_metrics={"token_accuracy": sft.token_accuracy, "agreement": agreement},
        scorer=Scorer(
            (logps, tokens), score, config.teacher, "objective.teacher", f"temperature={temperature}",
            revision=config.teacher_revision, is_of_run=False, num_likeliest=config.top_k,
        ),
    )  # fmt: skip


def bucket_logps(
    logits_NV: torch.Tensor, tokens_NK: torch.Tensor, is_token_NK: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the log-probabilities of some tokens and, if there are others, of all the others together [N, K or K + 1].

    Args:
        logits_NV: Logits.
        tokens_NK: Different tokens at each place, the likeliest first.
        is_token_NK: Which of them exist; the others get a probability of 0.
    """
    num_tokens = logits_NV.shape[1]
    if is_token_NK is not None:
        tokens_NK = torch.where(is_token_NK, tokens_NK, tokens_NK[:, :1]).clamp(max=num_tokens - 1)
    found = logits_NV.gather(1, tokens_NK)
    if is_token_NK is not None:
        found = found.masked_fill(~is_token_NK, -math.inf)
    if tokens_NK.shape[1] < num_tokens:
        # Not 1 - sum, which is 0 in float32 where the student is too sure, and would have no gradient there.
        others = logits_NV.scatter(1, tokens_NK, -math.inf).logsumexp(1, keepdim=True)
        found = torch.cat([found, others], dim=1)
    return torch.log_softmax(found, dim=1).clamp(min=_FLOOR)


def forward_kl(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """Return KL(teacher ‖ student) at each place [N], of log-probabilities."""
    return (teacher.exp() * (teacher - student)).sum(1)


def reverse_kl(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """Return KL(student ‖ teacher) at each place [N], of log-probabilities."""
    return forward_kl(student, teacher)


def jsd(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """Return the Jensen-Shannon divergence at each place [N]: the mean KL of both from their mean (Lin 1991)."""
    mean = torch.logaddexp(teacher, student) - math.log(2)
    return (forward_kl(teacher, mean) + forward_kl(student, mean)) / 2


_DIVERGENCES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "forward": forward_kl, "reverse": reverse_kl, "jsd": jsd,
}  # fmt: skip
