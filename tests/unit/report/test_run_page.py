"""The page of a run: what stands in its files stands on it, inert, at any stage and size of the run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dist_ft import cli
from dist_ft.layout import RunDir
from dist_ft.metric_rows import EvalRow, StepRow
from dist_ft.report.run_page import render_run_page
from dist_ft.run.events import AttemptBegan, LedgerEntry
from dist_ft.run.state import RunRecord
from dist_ft.run.status import RunStatus, SavedCheckpoint
from dist_ft.storage.publish import write_json
from tests.helpers.pages import check_inert, texts_of
from tests.helpers.rows import step_row

STATUS: dict[str, Any] = {
    "run_id": "demo", "state": "running", "attempt": 2, "step": 4, "max_steps": 40, "world_size": 2, "workers": [],
    "checkpoints": [{"step": 4, "path": "/runs/demo/checkpoints/step-00000004-a0001"}], "exports": [],
    "wandb_id": None, "sink_ids": {}, "goodput": 0.875,
}  # fmt: skip
LEDGER = [LedgerEntry.from_dict(entry) for entry in (
    {"time": 1000.0, "event": "attempt", "attempt": 1, "world_size": 3, "start_step": 0},
    {"time": 1060.0, "event": "commit", "attempt": 1, "step": 4},
    {"time": 1120.0, "event": "recovering", "attempt": 1, "step": 5, "wait_s": 0, "reason": "restart 1 of 20",
     "cause": {"type": "NodeLostError", "message": "10.0.0.3 is gone"}},
    {"time": 1180.0, "event": "attempt", "attempt": 2, "world_size": 2, "start_step": 4},
    {"time": 1300.0, "event": "commit", "attempt": 2, "step": 8},
)]  # fmt: skip


def status_of(values: dict[str, Any]) -> RunStatus:
    saved = tuple(SavedCheckpoint(**found) for found in values["checkpoints"])
    return RunStatus(RunRecord.from_dict(values), saved, tuple(values["exports"]))


def row(step: int, **changes: Any) -> StepRow:
    base = {"loss": 2.0 / step, "tokens_per_s": 90.0, "step_s": 2.0, "data_s": 0.01, "goodput": 0.8}
    return step_row(step, **{**base, **changes})


def rows(count: int) -> dict[int, StepRow]:
    return {step: row(step) for step in range(1, count + 1)}


def points_of(page: str, name: str) -> list[tuple[float, ...]]:
    (found,) = re.findall(rf'points="([^"]*)"[^>]*><title>{name}<', page)
    return [tuple(map(float, point.split(","))) for point in found.split()]


def test_all_that_the_files_say_is_on_the_page() -> None:
    evals = {0: EvalRow(0, 1, {"eval_loss": 2.5}), 4: EvalRow(4, 1, {"eval_loss": 1.25})}
    page = render_run_page(status_of(STATUS), rows(4), evals, LEDGER)
    check_inert(page)
    shown = "\n".join(texts_of(page))
    for said in (
        "running at step 4 of 40, attempt 2, 2 workers; 88% of the time", "1.25", "step-00000004-a0001",
        "restart 1 of 20", "NodeLostError: 10.0.0.3 is gone", "1970-01-01 00:18:40",
    ):  # fmt: skip
        assert said in shown
    assert "commit" not in shown
    assert [len(points_of(page, name)) for name in ("training", "held-out", "tokens", "share", "goodput")] == [
        4,
        2,
        4,
        4,
        4,
    ]


def test_the_number_of_workers_is_a_staircase() -> None:
    points = points_of(render_run_page(status_of(STATUS), {}, {}, LEDGER), "workers")
    (x0, y0), (x1, y1), (x2, y2), (x3, y3) = points
    assert y0 == y1 < y2 == y3
    assert x0 < x1 == x2 < x3
    assert (x1 - x0) / (x3 - x0) == pytest.approx(180 / 300, abs=0.01)


def test_many_steps_make_no_large_page() -> None:
    ledger = [LedgerEntry(float(n), n, AttemptBegan(world_size=2, start_step=0)) for n in range(5000)]
    page = render_run_page(status_of(STATUS), rows(5000), {}, ledger)
    check_inert(page)
    assert len(points_of(page, "training")) <= 600
    assert len(page) < 300_000
    assert page.count("<tr>") < 250


def test_losses_that_are_no_numbers_are_left_out() -> None:
    steps = rows(4) | {2: row(2, loss=float("nan")), 3: row(3, loss=None)}
    assert len(points_of(render_run_page(status_of(STATUS), steps, {}, []), "training")) == 2


def test_evaluations_without_a_loss_are_left_out() -> None:
    measured: dict[int, dict[str, float | None]] = {0: {"eval_loss": 2.5}, 2: {"eval_loss": None}, 4: {"bleu": 0.5}}
    evals = {step: EvalRow(step, 1, metrics) for step, metrics in measured.items()}
    page = render_run_page(status_of(STATUS), rows(4), evals, [])
    assert len(points_of(page, "held-out")) == 1
    assert page.count("<tr>") == 3 + 2  # the heads of three tables, an evaluation, a checkpoint


def test_hostile_text_stays_inert() -> None:
    hostile = '<script>alert(1)</script>" onload="x \x1b[2J\u202e'
    status = {
        **STATUS, "run_id": hostile, "error": {"type": hostile, "message": hostile}, "exports": [hostile],
        "checkpoints": [{"step": 1, "path": hostile}],
    }  # fmt: skip
    ledger = [LedgerEntry.from_dict({"time": 1.0, "event": hostile, "attempt": hostile, hostile: {hostile: hostile}})]
    check_inert(render_run_page(status_of(status), rows(2), {}, ledger))


Call = Callable[..., int]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "demo"
    keys = ("run_id", "state", "attempt", "step", "max_steps", "world_size", "workers", "sink_ids", "goodput")
    write_json(RunDir(path).run_json, {key: STATUS[key] for key in keys})
    return path


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Call:
    def invoke(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["dist-ft", "report", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return int(caught.value.code or 0)

    return invoke


def test_a_report_is_written_into_the_run_or_where_it_is_asked_for(
    run: Path, call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.dumps(row(step).to_dict()) for step in (1, 2)]
    RunDir(run).metrics.write_text("\n".join([*lines, '{"step": 3, "att']))  # a writer that died
    assert call(str(run)) == call(str(run), "--to", str(tmp_path / "page.html")) == 0
    first, second = (run / "report.html").read_text(), (tmp_path / "page.html").read_text()
    assert first == second
    assert len(points_of(first, "training")) == 2
    assert capsys.readouterr().out.split() == [str(run / "report.html"), str(tmp_path / "page.html")]


def test_a_run_that_has_just_begun_has_a_page(run: Path, call: Call) -> None:
    assert call(str(run)) == 0
    check_inert((run / "report.html").read_text())


def test_what_is_no_run_ends_with_2(call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(str(tmp_path)) == 2
    assert "is not a run directory" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()
