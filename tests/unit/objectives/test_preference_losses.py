"""Preference losses on their own: what they are where model and reference agree, and what changes nothing."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from dist_ft.config.training_sections import ObjectiveConfig, SteeringMetric
from dist_ft.data.stream.loader import micro_batch
from dist_ft.data.stream.token_shards import Row
from dist_ft.objectives.kinds import build_objective
from dist_ft.objectives.objective import Objective, Outputs, Rows
from dist_ft.objectives.preference import answer_logps
from dist_ft.run.scores import LOWER_IS_BETTER, chosen_warning
from dist_ft.slots import SlotTotals

VOCABULARY = 11
CPU = torch.device("cpu")
PAIRS = [{"kind": "dpo", "loss": loss} for loss in ("sigmoid", "hinge", "ipo", "sigmoid_norm", "apo_zero", "apo_down")]
ALL = [
    *PAIRS, {"kind": "dpo", "loss": "robust", "label_smoothing": 0.2}, {"kind": "dpo", "sft_weight": 1.0},
    {"kind": "cpo"}, {"kind": "cpo", "loss": "simpo"}, {"kind": "orpo"}, {"kind": "kto"},
    {"kind": "kto", "loss": "apo_zero_unpaired"},
]  # fmt: skip


def objective_of(settings: dict[str, Any]) -> Objective:
    return build_objective(TypeAdapter(ObjectiveConfig).validate_python(settings))


def sequence(seed: int, equal: bool = False, swapped: bool = False) -> Row:
    """Returns two samples of 7 and 5 tokens, or twice the same; answers begin at 3."""
    rng = np.random.default_rng(seed)
    samples = [rng.integers(0, VOCABULARY, length) for length in (7, 5)]
    samples = [samples[0], samples[0]] if equal else samples[::-1] if swapped else samples
    trained = [np.arange(len(ids)) >= 3 for ids in samples]
    numbers = {"answer_start": np.array([3, 3], np.float32), "label": np.array([seed % 2] * 2, np.float32)}
    starts = np.array([0, len(samples[0])], np.int32)
    return Row(np.concatenate(samples).astype(np.int32), np.concatenate(trained), starts, numbers)


def measure(
    objective: Objective, sequences: list[Row], packed: bool, reference: float | None = None, padding: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the sums, and the gradient of the table of logits that stands for a model.

    Args:
        objective: What is measured.
        sequences: Of two samples.
        packed: Whether they are rows, or their samples are.
        reference: Log-probability of every answer by the reference; None is that of the model.
        padding: Slots without a sequence.
    """
    if objective.rows_per_slot == 1:
        cut = [row.starts[1] for row in sequences]
        sequences = [
            Row(row.input_ids[:end], row.trained[:end], row.starts[:1], {k: v[:1] for k, v in row.numbers.items()})
            for row, end in zip(sequences, cut, strict=True)
        ]
    layout = objective.layout(0, 1, len(sequences) + padding, packed)
    rows = Rows.of(micro_batch(sequences, list(range(len(sequences))), layout), CPU)
    table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(5), requires_grad=True)
    outputs = Outputs(table[rows.input_ids_BT[rows.is_trained_BT]], rows.targets_BT[rows.is_trained_BT])
    logps_S = answer_logps(outputs, rows)[0].detach()
    scored = logps_S if reference is None else torch.full_like(logps_S, reference)
    rows = Rows(**{**vars(rows), "numbers": {**rows.numbers, "ref_logps": scored}})
    sums = objective.loss(outputs, rows)
    sums[0].backward()
    assert table.grad is not None
    return sums.detach(), table.grad


@pytest.mark.parametrize(
    ("settings", "loss"),
    [
        ({"kind": "dpo"}, math.log(2)), ({"kind": "dpo", "loss": "sigmoid_norm"}, math.log(2)),
        ({"kind": "dpo", "loss": "robust", "label_smoothing": 0.2}, math.log(2)), ({"kind": "dpo", "loss": "hinge"}, 1),
        ({"kind": "dpo", "loss": "apo_zero"}, 1), ({"kind": "dpo", "loss": "apo_down"}, 1),
        ({"kind": "dpo", "loss": "ipo", "beta": 0.2}, 1 / (4 * 0.2**2)), ({"kind": "kto"}, 0.5),
        ({"kind": "kto", "loss": "apo_zero_unpaired"}, 0.5),
    ],
    ids=str,
)  # fmt: skip
def test_the_first_loss_is_known_before_training(settings: dict[str, Any], loss: float) -> None:
    objective = objective_of(settings)
    sums, _ = measure(objective, [sequence(1), sequence(2)], packed=False)
    assert float(sums[0]) / 2 == pytest.approx(loss, rel=1e-6)
    numbers = objective.means(objective.metrics, sums[1:].tolist(), 2)
    assert [numbers[name] for name in numbers if name.startswith("rewards/")] == [0] * sum(
        name.startswith("rewards/") for name in numbers
    )


@pytest.mark.parametrize("settings", ALL, ids=str)
def test_padding_and_packing_change_nothing(settings: dict[str, Any]) -> None:
    objective = objective_of(settings)
    sequences = [sequence(seed) for seed in range(4)]
    sums, gradient = measure(objective, sequences, packed=False, reference=-20.0)
    for packed, padding in ((True, 0), (False, 2), (True, 1)):
        others, other_gradient = measure(objective, sequences, packed, reference=-20.0, padding=padding)
        torch.testing.assert_close(others, sums)
        torch.testing.assert_close(other_gradient, gradient)
    alone = [measure(objective, [one], packed=False, reference=-20.0) for one in sequences]
    torch.testing.assert_close(sum(found[0] for found in alone), sums)
    torch.testing.assert_close(sum(found[1] for found in alone), gradient)


@pytest.mark.parametrize("settings", ALL, ids=str)
def test_padding_alone_adds_nothing(settings: dict[str, Any]) -> None:
    sums, gradient = measure(objective_of(settings), [], packed=False, padding=2)
    assert not sums.any()
    assert not gradient.any()


@pytest.mark.parametrize("settings", PAIRS, ids=str)
def test_swapped_answers_negate_the_margin_and_equal_ones_teach_nothing(settings: dict[str, Any]) -> None:
    objective = objective_of(settings)
    margin = 1 + objective.metrics.index("rewards/margins")
    one, other = (measure(objective, [sequence(3, swapped=s)], False, reference=-9.0)[0] for s in (False, True))
    assert float(one[margin]) == pytest.approx(-float(other[margin]), rel=1e-6)
    assert abs(float(one[margin])) > 0.01
    if settings["loss"].startswith("apo"):
        return  # they move each answer on its own, not the margin
    _, gradient = measure(objective, [sequence(3, equal=True)], packed=False)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-6, rtol=0)


def test_a_label_decides_where_an_answer_goes_and_what_divides_its_numbers() -> None:
    objective = objective_of({"kind": "kto", "loss": "apo_zero_unpaired"})
    sums, _ = measure(objective, [sequence(1), sequence(2), sequence(3)], packed=False, reference=-1.0)
    numbers = objective.means(objective.metrics, sums[1:].tolist(), 3)
    assert (numbers["labels/chosen"], numbers["labels/rejected"]) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    alone, _ = measure(objective, [sequence(2)], packed=False, reference=-1.0)
    assert numbers["rewards/rejected"] == pytest.approx(float(alone[1 + objective.metrics.index("rewards/rejected")]))
    only_bad = objective.means(objective.metrics, alone[1:].tolist(), 1)
    assert only_bad["rewards/chosen"] is None


def test_pairs_and_rows_are_what_a_step_is_divided_by() -> None:
    totals = SlotTotals(3, 90, 20, num_samples=14)
    assert [objective_of(settings).weight(totals) for settings in ALL] == [7] * (len(ALL) - 1) + [14]


@pytest.mark.parametrize("settings", ALL, ids=str)
def test_a_metric_that_steers_is_measured_and_has_a_direction(settings: dict[str, Any]) -> None:
    config = TypeAdapter(ObjectiveConfig).validate_python(settings)
    objective = build_objective(config)
    assert set(config.steering) <= {*objective.eval_names(), *objective.differences}
    assert set(SteeringMetric.__args__) == LOWER_IS_BETTER.keys()


@pytest.mark.parametrize(("before", "now", "warns"), [(-50.0, -60.0, True), (-50.0, -49.0, False), (None, -3.0, False)])
def test_chosen_answers_that_become_unlikely_are_a_warning(before: float | None, now: float, warns: bool) -> None:
    warning = chosen_warning({"logps/chosen": before}, {"logps/chosen": now})
    assert (warning is not None and "objective.sft_weight" in warning) == warns
