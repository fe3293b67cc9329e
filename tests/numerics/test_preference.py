"""Preference objectives in the real loop: equal at every shape, and exact across a stop that goes on elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dist_ft.config import Config
from dist_ft.config.schema import EvalConfig
from tests.helpers.attempts import Attempt, prepare, relative_l2, train
from tests.helpers.configs import preference_config
from tests.helpers.ranks import RankServer

OBJECTIVES: dict[str, dict[str, Any]] = {"dpo": {"kind": "dpo", "sft_weight": 0.5}, "kto": {"kind": "kto"}}
STEPS = 3


def config_at(data: Path, name: str, packing: bool, stage: int, size: int, micro: int) -> Config:
    config = preference_config(
        data, OBJECTIVES[name], run__name=f"{name}-{stage}-{size}", data__packing=packing, zero__stage=stage,
        cluster__num_workers=size, train__micro_batch_size=micro, train__max_steps=STEPS, optimizer__lr=1e-3,
    )  # fmt: skip
    return config.model_copy(update={"eval": EvalConfig(every_steps=STEPS)})


def assert_equal(attempt: Attempt, first: Attempt) -> None:
    for row, wanted in zip(attempt.rows + attempt.evals, first.rows[-len(attempt.rows) :] + first.evals, strict=True):
        # Where all margins are 0 but for rounding, their signs mean nothing.
        is_tied = "rewards/accuracies" in wanted and abs(wanted["rewards/margins"]) < 1e-6
        for key in [k for k in wanted if "/" in k and not (k == "rewards/accuracies" and is_tied)]:
            assert row[key] == pytest.approx(wanted[key], rel=1e-4, abs=1e-4), key
        for key in {"loss", "eval_loss"} & wanted.keys():
            assert row[key] == pytest.approx(wanted[key], rel=1e-5)
    assert relative_l2(attempt.weights(), first.weights()) < 1e-5


@pytest.mark.parametrize(("name", "packing"), [("dpo", True), ("kto", False)])
def test_a_run_is_the_same_on_three_workers_and_after_a_stop(
    name: str, packing: bool, tmp_path: Path, ranks: RankServer
) -> None:
    alone = config_at(tmp_path, name, packing, 0, 1, 2)
    whole = train(ranks, alone, prepared=prepare(ranks, alone))
    # Slots on three workers leave some places to padding.
    several = config_at(tmp_path, name, packing, 3, 3, 1)
    prepared = prepare(ranks, several)
    assert_equal(train(ranks, several, prepared=prepared), whole)
    two = config_at(tmp_path, name, packing, 2, 2, 3)
    begun = train(ranks, two, prepared=prepared, stop_after=1)
    on = train(
        ranks,
        config_at(tmp_path, name, packing, 2, 2, 1),
        prepared=prepared,
        start=begun.manifests[1],
        evaluations=begun.evals,
    )
    assert begun.losses | on.losses == pytest.approx(whole.losses, rel=1e-5)
    assert relative_l2(on.weights(), whole.weights()) < 1e-5
