"""The trainer runs any objective: sums over slots, a divisor and a number of the step that no shape can change."""

from __future__ import annotations

import pytest

from dist_ft.config.schema import EvalConfig
from tests.helpers.attempts import Attempt, relative_l2, train
from tests.helpers.configs import tiny_config
from tests.helpers.ranks import RankServer

SHAPES = [(0, 1, 1), (2, 2, 2), (3, 3, 1)]
"""Stage, workers, micro batch. Eight slots on three workers leave one of nine to padding."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, ranks: RankServer) -> list[Attempt]:
    data = tmp_path_factory.mktemp("objectives")
    attempts = []
    for stage, size, micro in SHAPES:
        changes = {"zero__stage": stage, "cluster__num_workers": size, "train__micro_batch_size": micro}
        config = tiny_config(data, run__name=f"w{size}", train__max_steps=3, optimizer__lr=1e-3, **changes)
        config = config.model_copy(update={"eval": EvalConfig(every_steps=3)})
        attempts.append(train(ranks, config, body="train_by_another_objective"))
    return attempts


def test_losses_metrics_and_weights_are_equal_at_every_shape(trained: list[Attempt]) -> None:
    for attempt in trained[1:]:
        assert attempt.losses == pytest.approx(trained[0].losses, rel=1e-5)
        for row, wanted in zip(attempt.rows, trained[0].rows, strict=True):
            assert row["step_mean"] == pytest.approx(wanted["step_mean"], rel=1e-5)
        assert relative_l2(attempt.weights(), trained[0].weights()) < 1e-5


def test_the_number_of_a_step_is_the_mean_over_all_its_slots(trained: list[Attempt]) -> None:
    for row in trained[0].rows + trained[1].rows + trained[2].rows:
        assert row["one"] == 1.0  # padding weighs nothing, in the sums as in the divisor
        assert row["loss"] == pytest.approx(row["step_mean"] * (1 + row["step_mean"]), rel=1e-5)


def test_evaluations_hold_the_objectives_metrics_and_nothing_of_another(trained: list[Attempt]) -> None:
    for attempt in trained:
        for row in attempt.evals:
            assert list(row) == ["step", "attempt", "eval_loss", "step_mean", "one"]
            assert row["eval_loss"] == pytest.approx(row["step_mean"] * (1 + row["step_mean"]), rel=1e-5)
