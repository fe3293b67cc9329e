"""What a run on measured data costs, against its own preparation and a count by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dist_ft.jobs.data_report.measure import measure
from dist_ft.jobs.plan.cost import estimate_cost, flops, trained_shape
from dist_ft.jobs.prepare import prepare
from tests.helpers.configs import tiny_config, write_rows


@pytest.mark.parametrize("train", [{"max_steps": 6}, {"max_steps": None, "epochs": 2.5}, {"max_steps": None}])
def test_the_length_is_that_of_the_run(tmp_path: Path, train: dict[str, Any]) -> None:
    changes = {f"train__{key}": value for key, value in train.items()}
    config = tiny_config(tmp_path, data__packing=True, **changes)
    inputs = prepare(config).inputs
    cost = estimate_cost(config, measure(config).splits, trained_shape(config))
    assert cost is not None
    assert (cost.steps, cost.sequences) == (inputs.max_steps, inputs.num_positions)
    counts = inputs.splits[0].known_counts
    assert cost.tokens == pytest.approx(counts.num_tokens * cost.sequences / counts.num_sequences, abs=1)
    assert cost.epochs == pytest.approx(cost.sequences / counts.num_sequences, abs=1e-4)


def test_weights_decide_how_often_a_source_is_used(tmp_path: Path) -> None:
    few, many = write_rows(tmp_path / "few.jsonl", 10), write_rows(tmp_path / "many.jsonl", 90, first=50)
    sources = [{"source": str(few), "weight": 1.0}, {"source": str(many), "weight": 1.0}]
    config = tiny_config(tmp_path, data__train=sources, train__max_steps=None, train__epochs=2.0)
    cost = estimate_cost(config, measure(config).splits, trained_shape(config))
    assert cost is not None
    assert (cost.epochs, cost.sequences) == (2.0, 2 * 179)  # in turn, until the larger one is used up
    assert cost.passes == (17.9, pytest.approx(179 / 90, abs=1e-4))


def test_frozen_parameters_cost_less(tmp_path: Path) -> None:
    full = tiny_config(tmp_path)
    lora = tiny_config(tmp_path, method__kind="lora")
    of_full, of_lora = (estimate_cost(config, measure(config).splits, trained_shape(config)) for config in (full, lora))
    assert of_full is not None and of_lora is not None
    assert of_full.flops == 6 * of_full.params * of_full.tokens
    assert of_lora.trained_params < of_lora.params / 4
    assert of_lora.flops == flops(of_lora.params, of_lora.trained_params, of_lora.tokens)
    assert 4 < of_lora.flops / of_lora.params / of_lora.tokens < 4.5


def test_data_that_no_run_would_take_costs_nothing(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("broken\n")
    config = tiny_config(tmp_path, data__train=[{"source": str(tmp_path / "bad.jsonl")}])
    assert estimate_cost(config, measure(config).splits, trained_shape(config)) is None
