"""Which runs are complete already, for the end that a config asks for."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from dist_ft.config import Config, dump_yaml
from dist_ft.orchestrate.driver.previous import find_finished
from dist_ft.run.place import open_run
from dist_ft.run.state import RunRecord
from dist_ft.storage.publish import write_json

STOPPING = {"patience": 2}


def _config(early_stopping: Any = None, max_steps: int = 60) -> Config:
    return Config.model_validate(
        {
            "run": {"name": "r"},
            "model": {"name": "tiny-random"},
            "data": {"train": [{"source": "embedded:orders/train"}], "eval": "embedded:orders/eval"},
            "train": {"max_steps": max_steps},
            "eval": {"every_steps": 10, "early_stopping": early_stopping},
        }
    )


@pytest.mark.parametrize(
    ("ended_at", "had", "wants", "is_finished"),
    [
        (60, None, _config(), True),
        (60, None, _config(STOPPING), True),  # it has all steps: how it would have stopped does not matter
        (60, None, _config(max_steps=80), False),
        (30, STOPPING, _config(STOPPING), True),
        (30, STOPPING, _config({"patience": 5}), False),
        (30, STOPPING, _config(), False),
    ],
)
def test_a_run_is_complete_for_the_end_that_it_was_asked_for(
    ended_at: int, had: Any, wants: Config, is_finished: bool, tmp_path: Path
) -> None:
    run_dir = open_run(tmp_path)
    result = {"final_loss": 1.0, "early_stop": {"metric": "eval_loss", "best_step": 10, "patience": 2}}
    record = RunRecord("r", state="completed", attempt=1, step=ended_at, max_steps=60, result=result)
    write_json(run_dir.run_json, asdict(record))
    run_dir.config.write_text(dump_yaml(_config(had)), encoding="utf-8")
    found = find_finished(wants, run_dir)
    assert (found is not None) is is_finished
    if found is not None:
        assert (found.state, found.steps, found.early_stop) == ("completed", ended_at, result["early_stop"])
