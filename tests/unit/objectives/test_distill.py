"""Distillation on its own: buckets against the whole vocabulary, equal models, what is stored, other embeddings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dist_ft.config.training_sections import DistillConfig, SteeringMetric
from dist_ft.data.stream.loader import RankLayout, micro_batch
from dist_ft.data.stream.token_shards import Row
from dist_ft.objectives import sft
from dist_ft.objectives.distill import bucket_logps, distill, forward_kl, jsd, reverse_kl
from dist_ft.objectives.objective import Objective, Outputs, Rows
from dist_ft.run.scores import LOWER_IS_BETTER

VOCABULARY = 50
CPU = torch.device("cpu")
KINDS = ["forward", "reverse", "jsd"]


def objective_of(**settings: Any) -> Objective:
    return distill(DistillConfig(teacher="t", **settings))


def random_logits(seed: int, places: int = 9, vocabulary: int = VOCABULARY, spread: float = 2.0) -> torch.Tensor:
    return spread * torch.randn(places, vocabulary, generator=torch.Generator().manual_seed(seed))


def rows_with(entries: tuple[torch.Tensor, ...], objective: Objective, places: int = 9) -> Rows:
    """Returns one row whose trained tokens have these entries of the teacher."""
    ids = np.arange(places + 1, dtype=np.int32)
    row = Row(ids, ids > 0, np.zeros(1, np.int32), {})
    rows = Rows.of(micro_batch([row], [0], RankLayout(0, 1, 1, 1)), CPU)
    assert objective.scorer is not None
    columns = objective.scorer.columns
    stored = {c.name: e.to(getattr(torch, c.dtype)) for c, e in zip(columns, entries, strict=True)}
    return Rows(**{**vars(rows), "numbers": stored})


def scored(objective: Objective, logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
    assert objective.scorer is not None
    return objective.scorer.score(Outputs(logits, torch.zeros(len(logits), dtype=torch.long)), None)  # type: ignore[arg-type]


def measure(objective: Objective, teacher: torch.Tensor, student: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the sums, and the gradient of the loss by the student's logits."""
    student = student.clone().requires_grad_()
    rows = rows_with(scored(objective, teacher), objective, len(student))
    sums = objective.loss(Outputs(student, rows.targets_BT[rows.is_trained_BT]), rows)
    sums[0].backward()
    assert student.grad is not None
    return sums.detach(), student.grad


def plain(kind: str, teacher: torch.Tensor, student: torch.Tensor, temperature: float) -> torch.Tensor:
    """Returns the divergence over the whole vocabulary, from torch's own functions."""
    p, q = torch.log_softmax(teacher / temperature, 1), torch.log_softmax(student / temperature, 1)
    if kind == "forward":
        return F.kl_div(q, p, reduction="sum", log_target=True)
    if kind == "reverse":
        return F.kl_div(p, q, reduction="sum", log_target=True)
    mean = ((p.exp() + q.exp()) / 2).log()
    return (
        F.kl_div(mean, p, reduction="sum", log_target=True) + F.kl_div(mean, q, reduction="sum", log_target=True)
    ) / 2


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_all_tokens_give_the_plain_divergence_within_the_rounding_of_what_is_stored(
    kind: str, temperature: float
) -> None:
    objective = objective_of(divergence=kind, top_k=VOCABULARY, temperature=temperature)
    teacher, student = random_logits(1), random_logits(2)
    sums, gradient = measure(objective, teacher, student)
    leaf = student.clone().requires_grad_()
    wanted = temperature**2 * plain(kind, teacher, leaf, temperature)
    wanted.backward()
    assert leaf.grad is not None
    assert float(sums[0]) == pytest.approx(float(wanted.detach()), rel=1e-3)
    assert torch.allclose(gradient, leaf.grad, atol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_buckets_of_exact_log_probabilities_are_the_plain_divergence_exactly(kind: str) -> None:
    teacher, student = random_logits(1).double(), random_logits(2).double()
    tokens = teacher.topk(VOCABULARY).indices
    found = {"forward": forward_kl, "reverse": reverse_kl, "jsd": jsd}[kind](
        bucket_logps(teacher, tokens), bucket_logps(student, tokens)
    )
    assert float(found.sum()) == pytest.approx(float(plain(kind, teacher, student, 1.0)), rel=1e-12)


@pytest.mark.parametrize("top_k", [4, VOCABULARY])
@pytest.mark.parametrize("kind", KINDS)
def test_equal_models_have_no_divergence_and_no_gradient(kind: str, top_k: int) -> None:
    sums, gradient = measure(objective_of(divergence=kind, top_k=top_k), random_logits(1), random_logits(1))
    # The teacher is stored in float16: its log-probabilities are off by 0.004, their squares count.
    assert 0 <= float(sums[0]) < 1e-4
    assert 0 <= float(sums[1]) < 1e-4
    assert float(gradient.abs().max()) < 1e-3


def test_64_tokens_and_a_bucket_have_the_gradient_of_the_whole_vocabulary() -> None:
    teacher = random_logits(1, 20, 4000, spread=4.0)
    student = teacher + random_logits(2, 20, 4000, spread=1.0)
    mass = torch.softmax(teacher, 1).topk(64).values.sum(1).mean()
    assert 0.85 < float(mass) < 0.95  # as of a real model on general text
    gradients = []
    for top_k in (64, 4000):
        gradients.append(measure(objective_of(top_k=top_k), teacher, student)[1].flatten())
    assert float(F.cosine_similarity(*gradients, dim=0)) > 0.998


def test_the_gradient_is_that_of_the_logits_at_the_temperature_times_its_square() -> None:
    """With T² the size of gradients does not depend on T; a loss multiplied only where it is reported would not do."""
    teacher, student = random_logits(1), random_logits(2)
    _, gradient = measure(objective_of(top_k=VOCABULARY, temperature=3.0), teacher, student)
    expected = 3.0 * (torch.softmax(student / 3, 1) - torch.softmax(teacher / 3, 1))
    assert torch.allclose(gradient, expected, atol=5e-3)


def test_a_student_that_is_sure_of_the_teachers_tokens_still_learns_of_the_others() -> None:
    teacher = torch.zeros(1, VOCABULARY)
    teacher[0, :2] = 0.5
    student = torch.zeros(1, VOCABULARY)
    student[0, 0] = 60.0  # 1 - its probability is 0 in float32
    assert 1 - torch.softmax(student, 1)[0, 0] == 0
    sums, gradient = measure(objective_of(top_k=2), teacher, student)
    assert torch.isfinite(sums).all()
    assert float(gradient[0, 0]) > 0.9
    assert (gradient[0, 2:] < 0).all()


def test_the_cross_entropy_is_added_by_its_weight_and_reported_without() -> None:
    teacher, student = random_logits(1), random_logits(2)
    alone, with_it = (measure(objective_of(top_k=8, ce_weight=weight), teacher, student) for weight in (0.0, 0.5))
    rows = rows_with(scored(objective_of(top_k=8), teacher), objective_of(top_k=8))
    leaf = student.clone().requires_grad_()
    nll = sft.loss(Outputs(leaf, rows.targets_BT[rows.is_trained_BT]), rows)
    nll.sum().backward()
    assert leaf.grad is not None
    assert float(alone[0][2]) == pytest.approx(float(nll.detach()), rel=1e-6)
    assert float(with_it[0][0] - alone[0][0]) == pytest.approx(0.5 * float(nll.detach()), rel=1e-5)
    assert torch.allclose(with_it[1] - alone[1], 0.5 * leaf.grad, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_the_teachers_embedding_that_the_student_lacks_do_not_count(kind: str) -> None:
    """Two sizes of a family often have the same tokens, but embeddings that are rounded up to different lengths."""
    objective = objective_of(divergence=kind, top_k=8)
    teacher, student = random_logits(1), random_logits(2)
    padded = F.pad(teacher, (0, 14), value=float(teacher.max()) - 0.5)  # rows without a token, likely by accident
    wanted = torch.cat([teacher, torch.full((9, 14), -1e4)], dim=1)
    sums, gradient = measure(objective, padded, student)
    assert torch.isfinite(sums).all()
    assert torch.isfinite(gradient).all()
    # With all places for the further rows taken, what is left is the divergence over fewer of the student's tokens.
    tokens = padded.topk(8).indices
    p = bucket_logps(wanted, tokens, tokens < VOCABULARY)
    q = bucket_logps(student, tokens, tokens < VOCABULARY)
    assert float(sums[1]) >= -1e-4
    assert p.shape == q.shape == (9, 9)


def test_padding_alone_gives_zeros_and_a_gradient() -> None:
    objective = objective_of(top_k=4, ce_weight=1.0)
    rows = Rows.of(micro_batch([], [], RankLayout(0, 1, 1, 1)), CPU)
    logits = torch.zeros(0, VOCABULARY, requires_grad=True)
    sums = objective.loss(Outputs(logits, torch.zeros(0, dtype=torch.long)), rows)
    sums[0].backward()
    assert sums.tolist() == [0, 0, 0]
    assert logits.grad is not None


def test_its_metrics_may_steer() -> None:
    objective = objective_of()
    assert set(DistillConfig.steering) == {"eval_loss", *objective.metrics, *objective.eval_metrics}
    assert set(DistillConfig.steering) <= LOWER_IS_BETTER.keys()
    assert {*SteeringMetric.__args__} == LOWER_IS_BETTER.keys()  # type: ignore[attr-defined]
