"""The trainer runs any objective: sums over slots, a divisor and a number of the step that no shape can change."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_ft.config.schema import EvalConfig
from tests.helpers.attempts import BODIES, Attempt, relative_l2, train
from tests.helpers.configs import tiny_config
from tests.helpers.ranks import RankServer

SHAPES = [(0, 1, 1), (2, 2, 2), (3, 3, 1)]
"""Stage, workers, micro batch. Eight slots on three workers leave one of nine to padding."""


def _train(data: Path, ranks: RankServer, objective: str) -> list[Attempt]:
    attempts = []
    for stage, size, micro in SHAPES:
        changes = {"zero__stage": stage, "cluster__num_workers": size, "train__micro_batch_size": micro}
        config = tiny_config(data, run__name=f"w{size}", train__max_steps=3, optimizer__lr=1e-3, **changes)
        config = config.model_copy(update={"eval": EvalConfig(every_steps=3)})
        arguments = {"config": config.model_dump(mode="json"), "objective": objective}
        (prepared,) = ranks.run(1, f"{BODIES}:prepare_for", arguments, in_group=False)
        attempts.append(train(ranks, config, prepared=prepared, body="train_by", objective=objective))
    return attempts


@pytest.fixture(scope="module")
def with_step_sum(tmp_path_factory: pytest.TempPathFactory, ranks: RankServer) -> list[Attempt]:
    return _train(tmp_path_factory.mktemp("step-sum"), ranks, "step_sum")


def _assert_equal(attempts: list[Attempt], metric: str) -> None:
    first = attempts[0]
    for attempt in attempts[1:]:
        assert attempt.losses == pytest.approx(first.losses, rel=1e-5)
        for row, wanted in zip(attempt.rows + attempt.evals, first.rows + first.evals, strict=True):
            # A margin is a difference of sums of some fifty nats in float32.
            assert row[metric] == pytest.approx(wanted[metric], rel=1e-5, abs=1e-4)
        assert relative_l2(attempt.weights(), first.weights()) < 1e-5


def test_losses_metrics_and_weights_are_equal_at_every_shape(with_step_sum: list[Attempt]) -> None:
    _assert_equal(with_step_sum, "step_mean")


def test_the_number_of_a_step_is_the_mean_over_all_its_slots(with_step_sum: list[Attempt]) -> None:
    for attempt in with_step_sum:
        for row in attempt.rows:
            assert row["one"] == 1.0  # padding weighs nothing, in the sums as in the divisor
            assert row["loss"] == pytest.approx(row["step_mean"] * (1 + row["step_mean"]), rel=1e-5)


def test_evaluations_hold_the_objectives_metrics_and_nothing_of_another(with_step_sum: list[Attempt]) -> None:
    for attempt in with_step_sum:
        for row in attempt.evals:
            assert list(row) == ["step", "attempt", "eval_loss", "step_mean", "one"]
            assert row["eval_loss"] == pytest.approx(row["step_mean"] * (1 + row["step_mean"]), rel=1e-5)
