"""Preference objectives: equal at every shape, right at step 0, and exact across a stop elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dist_ft.config.schema import EvalConfig
from tests.helpers.attempts import Attempt, prepare, relative_l2, train
from tests.helpers.configs import preference_config
from tests.helpers.ranks import RankServer

SHAPES = [(0, 1, 1, False), (2, 2, 2, False), (3, 3, 1, False)]
"""Stage, workers, micro batch, packed. Eight slots on three workers leave one of nine to padding."""
OBJECTIVES: dict[str, dict[str, Any]] = {
    "dpo": {"kind": "dpo", "sft_weight": 0.5},
    "simpo": {"kind": "cpo", "loss": "simpo"},
    "orpo": {"kind": "orpo"},
    "kto": {"kind": "kto"},
}


def _train(
    data: Path, ranks: RankServer, objective: dict[str, Any], stage: int, size: int, micro: int, packing: bool
) -> Attempt:
    changes = {
        "zero__stage": stage,
        "cluster__num_workers": size,
        "train__micro_batch_size": micro,
        "data__packing": packing,
    }
    config = preference_config(data, objective, run__name=f"w{size}", train__max_steps=3, optimizer__lr=1e-3, **changes)
    config = config.model_copy(update={"eval": EvalConfig(every_steps=3)})
    return train(ranks, config, prepared=prepare(ranks, config))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_metrics_and_weights_are_equal_at_every_shape(name: str, tmp_path: Path, ranks: RankServer) -> None:
    first, *others = [_train(tmp_path, ranks, OBJECTIVES[name], *shape) for shape in SHAPES]
    for row in first.rows + first.evals:
        print(row)
    for attempt in others:
        assert attempt.losses == pytest.approx(first.losses, rel=1e-5)
        for row, wanted in zip(attempt.rows + attempt.evals, first.rows + first.evals, strict=True):
            # Where all margins are 0 but for rounding, their signs mean nothing.
            is_tied = "rewards/margins" in wanted and abs(wanted["rewards/margins"]) < 1e-6
            for key in [k for k in wanted if "/" in k and not (k == "rewards/accuracies" and is_tied)]:
                assert row[key] == pytest.approx(wanted[key], rel=1e-4, abs=1e-4), key
        assert relative_l2(attempt.weights(), first.weights()) < 1e-5
