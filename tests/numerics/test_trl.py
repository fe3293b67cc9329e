"""The preference losses are TRL's: the same rows, four steps; `benchmarks/trl_preferences.py` took its numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_ft.config import Config
from dist_ft.data.stream.cache import open_split
from dist_ft.data.stream.loader import TrainLoader, build_order
from dist_ft.jobs.spec import Preparation, decode_preparation
from dist_ft.model.base import load_model
from dist_ft.objectives.kinds import build_objective
from dist_ft.objectives.module import ObjectiveModule
from dist_ft.objectives.objective import Rows
from tests.helpers.configs import tiny_config
from tests.helpers.rank_bodies import prepare

RECORDED = json.loads((Path(__file__).parent / "trl_preferences.json").read_text())
BATCH = 8
OBJECTIVES: dict[str, dict[str, Any]] = {
    **{
        f"dpo {loss}": {"kind": "dpo", "loss": loss}
        for loss in ("sigmoid", "hinge", "ipo", "sigmoid_norm", "apo_zero", "apo_down")
    },
    "dpo robust": {"kind": "dpo", "loss": "robust", "label_smoothing": 0.1},
    "dpo sft": {"kind": "dpo", "sft_weight": 0.5},
    "cpo sigmoid": {"kind": "cpo"},
    "cpo simpo": {"kind": "cpo", "loss": "simpo", "beta": 2.0, "gamma": 0.5, "sft_weight": 0.0},
    "orpo": {"kind": "orpo"},
    "kto kto": {"kind": "kto", "undesirable_weight": 1.5},
    "kto apo_zero_unpaired": {"kind": "kto", "loss": "apo_zero_unpaired"},
}


def train(config: Config, micro_batch_size: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Trains one process without DeepSpeed; returns the loss of each step and the weights."""
    found = decode_preparation(prepare(0, 1, config.model_dump(mode="json")))
    assert isinstance(found, Preparation)
    inputs, objective = found.inputs, build_objective(config.objective)
    opened = [open_split(split, config.data.loader) for split in inputs.splits]
    layout = objective.layout(0, 1, micro_batch_size, config.data.packing)
    loader = TrainLoader(build_order(opened, config.data, 0), opened, layout, BATCH, inputs.num_positions)
    model = load_model(config).train()
    module, device = ObjectiveModule(model), torch.device("cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    losses = []
    for step in range(inputs.max_steps):
        batch = loader.step(step)
        divisor = objective.weight(batch.totals)
        rows = [Rows.of(micro, device) for micro in batch.micro_batches]
        if objective.step_sum is not None:
            with torch.no_grad():
                others = [Rows.of(micro, device) for micro in batch.mismatched]
                total = sum(float(module(part, objective.step_sum)) for part in others)
            rows = [Rows.of(micro, device, total / divisor) for micro in batch.micro_batches]
        loss_sum = 0.0
        for part in rows:
            sums = module(part, objective.loss)
            (sums[0] / divisor).backward()
            loss_sum += float(sums[0].detach())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss_sum / divisor)
    loader.close()
    return losses, dict(model.named_parameters())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_and_weights_are_trls(name: str, tmp_path: Path) -> None:
    is_kto = name.startswith("kto")
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in RECORDED["labelled" if is_kto else "pairs"])
    )
    config = tiny_config(
        tmp_path, data__train=[{"source": str(tmp_path / "rows.jsonl")}], data__eval=None, data__shuffle=False,
        train__max_steps=4, train__global_batch_size=BATCH,
    )  # fmt: skip
    config = Config.model_validate({**config.model_dump(mode="json"), "objective": OBJECTIVES[name]})
    losses, weights = train(config, micro_batch_size=3)
    wanted = RECORDED["runs"][name]
    assert losses == pytest.approx(wanted["losses"], rel=1e-6)
    for key, values in wanted["weights"].items():
        flat = weights[key].detach().flatten()
        found = flat[torch.linspace(0, len(flat) - 1, len(values)).long()].numpy()
        assert np.linalg.norm(found - values) <= 2e-5 * np.linalg.norm(values), key
