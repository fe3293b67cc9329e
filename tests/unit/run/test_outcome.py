"""The result of a run as one line of JSON, and what run.json keeps of it."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from dist_ft.run.outcome import RunNumbers, RunResult

RESULT = RunResult("/runs/a", "failed", 3, error={"type": "DataError", "message": "no rows"}, comparison={"base": {}})
KNOWN = {"final_loss": 1.0, "eval_loss": None, "train_s": 2.0, "comparison": {}, "early_stop": None}


def test_a_printed_result_is_read_again() -> None:
    assert RunResult.from_json(json.dumps(asdict(RESULT))) == RESULT


def test_a_result_of_another_version_has_what_both_know() -> None:
    assert RunResult.from_json('{"run_dir": "/runs/a", "state": "stopped", "later": 1}') == RunResult(
        "/runs/a", "stopped"
    )


@pytest.mark.parametrize("line", ["{", "[]", '{"run_dir": "/runs/a"}'])
def test_what_is_no_result_is_an_error(line: str) -> None:
    with pytest.raises(ValueError):
        RunResult.from_json(line)


@pytest.mark.parametrize(
    ("result", "code"), [(RESULT, 2), (RunResult("a", "completed"), 0), (RunResult("a", "stopped"), 3)]
)
def test_a_result_says_the_exit_code(result: RunResult, code: int) -> None:
    assert result.exit_code == code


def test_numbers_that_are_not_known_yet_are_left_out() -> None:
    assert RunNumbers(final_loss=1.0, train_s=2.0).to_record() == KNOWN


def test_samples_are_for_the_screen_only() -> None:
    numbers = RunNumbers(1.0, None, 2.0, export_dir="/r/exports/step-3", evaluation={"num_rows": 1, "samples": [{}]})
    assert numbers.to_record() == {**KNOWN, "export_dir": "/r/exports/step-3", "evaluation": {"num_rows": 1}}
