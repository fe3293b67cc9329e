"""A run goes on in stock DeepSpeed, at any number of ranks, from an exported universal checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dist_ft.checkpoint.manifest import MANIFEST
from dist_ft.config import Config
from dist_ft.errors import UsageError
from dist_ft.jobs import export_universal
from tests.helpers.attempts import Attempt, prepare, run_path, train
from tests.helpers.configs import tiny_config
from tests.helpers.ranks import RankServer

STEP = 3
COMMON: dict[str, Any] = {
    "data__eval": None, "schedule__kind": "constant", "schedule__warmup_ratio": 0.0, "train__max_steps": 6,
    "checkpoint__every_steps": STEP, "checkpoint__keep_last": 9, "method__lora_dropout": 0.0,
}  # fmt: skip
CASES = {
    "full, two groups, ZeRO 2 → 1 rank, ZeRO 1": ({"zero__stage": 2}, 1, 1),
    "full, ZeRO 3 → 2 ranks, ZeRO 3": ({"zero__stage": 3, "optimizer__weight_decay": 0.0}, 2, 3),
    "lora, ZeRO 0 → 2 ranks, ZeRO 2": ({"zero__stage": 0, "method__kind": "lora"}, 2, 2),
}


def _train(
    ranks: RankServer, tmp_path: Path, prepared: dict[str, Any] | None = None, **changes: Any
) -> tuple[Config, Attempt, dict[str, Any]]:
    config = tiny_config(tmp_path, **{**COMMON, **changes})
    prepared = prepared or prepare(ranks, config)
    return config, train(ranks, config, prepared=prepared), prepared


@pytest.mark.parametrize("case", CASES)
def test_stock_deepspeed_goes_on_with_equal_losses(case: str, ranks: RankServer, tmp_path: Path) -> None:
    changes, world_size, stage = CASES[case]
    config, run, prepared = _train(ranks, tmp_path, **changes)
    to = tmp_path / "universal"
    checkpoint = f"{run.manifests[STEP].directory}/{MANIFEST}"
    found = export_universal.run(config, str(run_path(config)), checkpoint, str(to))
    assert found == {"step": STEP, "num_groups": len(run.manifests[STEP].groups)}
    arguments = {
        "config": config.model_dump(mode="json"), "prepared": prepared, "directory": str(to), "stage": stage,
        "num_steps": 3,
    }  # fmt: skip
    first, *others = ranks.run(world_size, "tests.helpers.stock_deepspeed:go_on", arguments)
    assert first["client_state"] == {
        "step": STEP, "epoch": 0, "position": STEP * 8, "seed": 3, "global_batch_size": 8,
        "schedule": dict(run.manifests[STEP].schedule),
    }  # fmt: skip
    assert first["global_steps"] == STEP
    expected = [run.losses[step] for step in (4, 5, 6)]
    for rank in (first, *others):
        assert rank["losses"] == pytest.approx(expected, rel=1e-5)


def test_another_optimizer_than_adamw_is_refused_before_anything_is_written(ranks: RankServer, tmp_path: Path) -> None:
    config, run, _ = _train(ranks, tmp_path, optimizer__kind="lion", optimizer__lr=1e-4, cluster__num_workers=1)
    checkpoint = f"{run.manifests[STEP].directory}/{MANIFEST}"
    with pytest.raises(UsageError, match="this run's optimizer is lion"):
        export_universal.run(config, str(run_path(config)), checkpoint, str(tmp_path / "universal"))
    assert not (tmp_path / "universal").exists()
