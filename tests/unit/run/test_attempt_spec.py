"""What a rank is told at its start: through JSON and back, unchanged."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace

import pytest

from dist_ft.messages import encode_line
from dist_ft.metric_rows import EvalRow
from dist_ft.run.attempt_spec import AttemptSpec, RankSpec
from tests.helpers.simulated_run import INPUTS, run_config

ATTEMPT = AttemptSpec(
    run_id="run-1", attempt=3, run_dir="/runs/run-1", config=run_config(),
    inputs=INPUTS, start_checkpoint="checkpoints/step-00000040-a0002/manifest.json", skipped_steps=(7,),
    recent_losses=(1.5, 1.25), evaluations=(EvalRow(20, 1, {"eval_loss": 2.5}),),
)  # fmt: skip


@pytest.mark.parametrize(
    "attempt",
    [ATTEMPT, replace(ATTEMPT, inputs=replace(INPUTS, eval_split=None), start_checkpoint=None)],
)
def test_a_rank_spec_survives_the_wire(attempt: AttemptSpec) -> None:
    spec = RankSpec(attempt, 1, 3, 1, "10.0.0.1", 8, {"CUDA_VISIBLE_DEVICES": "1"})
    assert RankSpec.from_dict(json.loads(encode_line(spec.to_dict()))) == spec


def test_an_attempt_spec_survives_ray() -> None:
    assert pickle.loads(pickle.dumps(ATTEMPT)) == ATTEMPT
