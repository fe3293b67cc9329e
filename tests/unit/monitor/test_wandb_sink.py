"""The W&B sink with real offline runs, read back from the files that W&B writes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import wandb
from wandb.proto import wandb_internal_pb2

from dist_ft.metric_rows import EvalRow, StepRow
from dist_ft.monitor.alerts import Alert
from dist_ft.monitor.wandb_sink import WandbSink, resolve_mode
from dist_ft.storage.publish import read_json, write_json
from tests.helpers.rows import step_row
from tests.helpers.wandb_files import history, records_of

RUN_ID = "abc12345"


@pytest.fixture(autouse=True)
def _no_run_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    yield
    if wandb.run is not None:  # of a sink that did not end it
        wandb.finish()


def _sink(directory: Path, backlog: Sequence[StepRow] = ()) -> WandbSink:
    directory.mkdir(exist_ok=True)
    return WandbSink(RUN_ID, "name", "project", "offline", directory, {"run": {"seed": 7}}, backlog)


def _row(step: int, attempt: int = 1) -> StepRow:
    return step_row(step, attempt, loss=1 / step, tokens_per_s=99.5)


def _steps(records: list[wandb_internal_pb2.Record]) -> list[int]:
    return [row["train/step"] for row in history(records) if "train/loss" in row]


@pytest.mark.parametrize(
    ("setting", "key", "mode"),
    [
        ("auto", None, "offline"),
        ("auto", "", "offline"),
        ("auto", "secret", "online"),
        ("online", None, "online"),
        ("offline", "secret", "offline"),
        ("disabled", "secret", "disabled"),
    ],
)
def test_modes(monkeypatch: pytest.MonkeyPatch, setting: str, key: str | None, mode: str) -> None:
    if key is not None:
        monkeypatch.setenv("WANDB_API_KEY", key)
    assert resolve_mode(setting) == mode


def test_every_row_is_in_wandb_once_and_the_run_is_finished(tmp_path: Path) -> None:
    sink = _sink(tmp_path)
    sink.log_eval(EvalRow(0, 1, {"eval_loss": 4.5}))
    for step in range(1, 301):  # more than one block of the file
        sink.log_step(_row(step))
    sink.log_eval(EvalRow(300, 1, {"eval_loss": 0.5, "exact_match": 0.25, "perplexity": None}))
    sink.close("completed")
    (records,) = records_of(tmp_path, RUN_ID)
    rows = history(records)
    assert _steps(records) == list(range(1, 301))
    row = rows[7]
    assert (row["train/step"], row["train/loss"], row["data/position"]) == (7, pytest.approx(1 / 7), 56)
    assert (row["perf/tokens_per_s"], row["run/attempt"], row["run/world_size"]) == (99.5, 1, 2)
    assert rows[0]["eval/eval_loss"] == 4.5
    assert (rows[-1]["train/step"], rows[-1]["eval/exact_match"]) == (300, 0.25)
    assert "eval/perplexity" not in rows[-1]
    assert [record.exit.exit_code for record in records if record.WhichOneof("record_type") == "exit"] == [0]


def test_the_x_axis_is_the_training_step_and_the_config_is_there(tmp_path: Path) -> None:
    sink = _sink(tmp_path)
    sink.log_step(_row(1))
    sink.close("failed")
    (records,) = records_of(tmp_path, RUN_ID)
    metrics = [record.metric for record in records if record.WhichOneof("record_type") == "metric"]
    assert {m.step_metric for m in metrics if m.name != "train/step"} == {"train/step"}
    (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert (run.run_id, run.display_name, run.project) == (RUN_ID, "name", "project")
    assert [json.loads(u.value_json) for u in run.config.update if u.key == "run"] == [{"seed": 7}]
    assert [record.exit.exit_code for record in records if record.WhichOneof("record_type") == "exit"] == [1]


def test_replayed_rows_are_left_out(tmp_path: Path) -> None:
    sink = _sink(tmp_path)
    for step, attempt in [(1, 1), (2, 1), (3, 1), (2, 2), (3, 2), (4, 2)]:
        sink.log_step(_row(step, attempt))
    sink.close("completed")
    (records,) = records_of(tmp_path, RUN_ID)
    assert _steps(records) == [1, 2, 3, 4]
    assert read_json(tmp_path / "wandb/sent.json")["step"] == 4


def test_a_further_sink_sends_what_may_be_lost_and_nothing_else(tmp_path: Path) -> None:
    first = _sink(tmp_path)
    for step in range(1, 5):
        first.log_step(_row(step))
    first.close("failed")
    backlog = [_row(step) for step in range(1, 7)]  # the writer died after row 6
    second = _sink(tmp_path, backlog)
    second.log_step(_row(5, attempt=2))
    second.log_step(_row(7, attempt=2))
    second.close("completed")
    assert [_steps(records) for records in records_of(tmp_path, RUN_ID)] == [[1, 2, 3, 4], [5, 6, 7]]
    assert {run.run_id for records in records_of(tmp_path, RUN_ID) for run in _runs(records)} == {RUN_ID}


def _runs(records: list[wandb_internal_pb2.Record]) -> list[wandb_internal_pb2.RunRecord]:
    return [record.run for record in records if record.WhichOneof("record_type") == "run"]


def test_a_sink_after_a_killed_one_goes_by_the_mark_that_is_safe(tmp_path: Path) -> None:
    (tmp_path / "wandb").mkdir()
    write_json(tmp_path / "wandb/sent.json", {"step": 2})
    sink = _sink(tmp_path, [_row(step) for step in range(1, 5)])
    sink.close("completed")
    assert [_steps(records) for records in records_of(tmp_path, RUN_ID)] == [[3, 4]]


@pytest.mark.parametrize("mark", ["", "{", "[]", "{}", '{"format_version": 9, "step": 5}'])
def test_a_broken_mark_sends_everything_again(tmp_path: Path, mark: str) -> None:
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb/sent.json").write_text(mark)
    sink = _sink(tmp_path, [_row(1), _row(2)])
    sink.close("completed")
    wandb.finish()
    assert [_steps(records) for records in records_of(tmp_path, RUN_ID)] == [[1, 2]]


def test_the_step_axis_never_runs_backwards(tmp_path: Path) -> None:
    sink = _sink(tmp_path)
    for step in (1, 2, 3, 4):
        sink.log_step(_row(step))
    sink.log_eval(EvalRow(4, 1, {"eval_loss": 1.0}))
    sink.log_eval(EvalRow(2, 2, {"eval_loss": 1.5}))  # replayed after a rollback
    sink.log_eval(EvalRow(0, 1, {"exact_match": 0.0}))  # the base model, measured after training
    sink.close("completed")
    wandb.finish()
    (records,) = records_of(tmp_path, RUN_ID)
    axis = [row["train/step"] for row in history(records)]
    assert all(a <= b for a, b in pairwise(axis))


def test_the_mark_never_falls(tmp_path: Path) -> None:
    sink = _sink(tmp_path)
    for step in (1, 2, 3, 4):
        sink.log_step(_row(step))
    sink.log_eval(EvalRow(2, 2, {"eval_loss": 1.5}))
    sink.close("completed")
    assert read_json(tmp_path / "wandb/sent.json")["step"] == 4


def test_a_directory_that_breaks_on_the_way_disturbs_nobody(tmp_path: Path) -> None:
    sink = _sink(tmp_path)
    sink.log_step(_row(1))
    _wait_for_file(tmp_path)
    shutil.rmtree(tmp_path / "wandb")
    (tmp_path / "wandb").write_text("in the way")
    for step in range(2, 100):
        sink.log_step(_row(step))
    began = time.monotonic()
    sink.close("completed")
    assert time.monotonic() - began < 30


def test_a_directory_that_breaks_before_the_first_row_disturbs_nobody(tmp_path: Path) -> None:
    sink = _sink(tmp_path)
    shutil.rmtree(tmp_path / "wandb")
    (tmp_path / "wandb").write_text("in the way")
    sink.log_step(_row(1))
    sink.log_eval(EvalRow(1, 1, {"eval_loss": 1.0}))
    began = time.monotonic()
    sink.close("failed")
    assert time.monotonic() - began < 30


def test_a_directory_that_cannot_be_written_fails_when_the_sink_is_made(tmp_path: Path) -> None:
    (tmp_path / "wandb").write_text("in the way")
    with pytest.raises(OSError, match="wandb"):
        _sink(tmp_path)


def _wait_for_file(directory: Path) -> None:
    deadline = time.monotonic() + 20
    while not list(directory.glob("wandb/offline-run-*/*.wandb")):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_token_in_the_remote_of_the_directory_that_a_run_starts_from_stays_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forges take a token as user name; W&B leaves out passwords only."""
    repository = tmp_path / "repository"
    identity = {
        "GIT_AUTHOR_NAME": "a",
        "GIT_AUTHOR_EMAIL": "a@b",
        "GIT_COMMITTER_NAME": "a",
        "GIT_COMMITTER_EMAIL": "a@b",
    }
    for words in (
        ["init", "-q", str(repository)],
        ["-C", str(repository), "commit", "-q", "--allow-empty", "-m", "x"],
        ["-C", str(repository), "remote", "add", "origin", "https://planted-token@git.example.com/x"],
    ):
        subprocess.run(["git", *words], env={**os.environ, **identity}, check=True)
    monkeypatch.chdir(repository)
    sink = _sink(tmp_path / "run")
    sink.log_step(_row(1))
    sink.close("completed")
    files = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert any(b"abc12345" in data for data in files)
    assert not any(b"planted-token" in data or b"git.example.com" in data for data in files)


def test_an_alert_goes_between_the_rows_and_ends_nothing(tmp_path: Path) -> None:
    sink = _sink(tmp_path)
    sink.log_step(_row(1))
    sink.send_alert(Alert("failure", "demo", 1, "rank 1 died"))
    sink.log_step(_row(2))
    sink.close("completed")
    (records,) = records_of(tmp_path, RUN_ID)
    assert _steps(records) == [1, 2]
    (alert,) = [record.alert for record in records if record.WhichOneof("record_type") == "alert"]
    assert (alert.title, alert.text, alert.level) == ("demo: failure", "rank 1 died", "ERROR")
