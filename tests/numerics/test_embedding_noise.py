"""Noise on the embeddings is drawn by sequence, so that runs are equal at every shape; evaluations have none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dist_ft.config.schema import EvalConfig
from tests.helpers.attempts import Attempt, relative_l2, train
from tests.helpers.configs import tiny_config
from tests.helpers.ranks import RankServer


def run(ranks: RankServer, folder: Path, name: str, **changes: Any) -> Attempt:
    """Run three steps with held-out losses before and after."""
    config = tiny_config(folder, run__name=name, train__max_steps=3, optimizer__lr=1e-3, **changes)
    return train(ranks, config.model_copy(update={"eval": EvalConfig(every_steps=3)}))


@pytest.mark.parametrize("packing", [False, True])
def test_noise_is_the_same_at_every_shape(tmp_path: Path, ranks: RankServer, packing: bool) -> None:
    noise = {"method__neftune_alpha": 5.0, "data__packing": packing}
    one = {"zero__stage": 0, "cluster__num_workers": 1}
    first = run(ranks, tmp_path, "one", **noise, **one, train__micro_batch_size=4)
    other = run(ranks, tmp_path, "three", **noise, zero__stage=3, cluster__num_workers=3, train__micro_batch_size=1)
    plain = run(ranks, tmp_path, "plain", **one, data__packing=packing)
    assert other.losses == pytest.approx(first.losses, rel=1e-5)
    assert relative_l2(other.weights(), first.weights()) < 1e-5
    assert abs(first.losses[1] - plain.losses[1]) > 1e-3
    assert first.evals[-1]["eval_loss"] == pytest.approx(other.evals[-1]["eval_loss"], rel=1e-5)
