"""The page of a run: what stands in its files stands on it, inert, at any stage and size of the run."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dist_ft import cli
from dist_ft.data.shards.counts import Counts
from dist_ft.layout import RunDir
from dist_ft.metric_rows import EvalRow, StepRow
from dist_ft.report.checkpoints import Entry
from dist_ft.report.pages import compare
from dist_ft.report.pages.history import attempts_of, bands_of
from dist_ft.report.pages.run_files import RunFiles
from dist_ft.report.pages.run_page import render_run_page
from dist_ft.run.events import AttemptBegan, LedgerEntry
from dist_ft.run.run_inputs import SplitSummary
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


def files_of(
    steps: dict[int, StepRow] | None = None,
    evals: dict[int, EvalRow] | None = None,
    ledger: Sequence[LedgerEntry] = (),
    status: dict[str, Any] | None = None,
    **more: Any,
) -> RunFiles:
    return RunFiles(status_of(status or STATUS), steps or {}, evals or {}, ledger, **more)


ENTRY = Entry(4, 1, 2, 2, 3 << 30, "/runs/demo/checkpoints/step-00000004-a0001", ("release",), True)
COUNTS = Counts(num_rows=2000, num_sequences=500, num_tokens=132_735, num_trained_tokens=55_643, num_bad_rows=7)
DATA = [SplitSummary("embedded:orders/train", 1, COUNTS, {"exact": 12}), SplitSummary("held-out", 3, None, {})]


def test_all_that_the_files_say_is_on_the_page() -> None:
    evals = {0: EvalRow(0, 1, {"eval_loss": 2.5}), 4: EvalRow(4, 1, {"eval_loss": 1.25, "token_accuracy": 0.75})}
    comparison = {"base": {"exact_match": 0.0}, "tuned": {"exact_match": 0.625}}
    status = {**STATUS, "result": {"comparison": comparison}, "exports": ["/runs/demo/exports/step-00000004"]}
    page = render_run_page(
        files_of(
            rows(4),
            evals,
            LEDGER,
            status,
            config_text="run:\n  name: demo\n",
            data=DATA,
            checkpoints=[ENTRY],
            export_names={"latest": "exports/step-00000004"},
            versions={"torch": "2.13.0"},
            answers=[{"prompt": "2 pizzas", "reference": "{}", "base": "Sure!\nWell", "tuned": "{...}"}],
        )
    )
    check_inert(page)
    shown = "\n".join(texts_of(page))
    for said in (
        "running at step 4 of 40, attempt 2, 2 workers; 88% of the time", "1.2500", "step-00000004-a0001", "release",
        "restart 1 of 20", "NodeLostError: 10.0.0.3 is gone", "1970-01-01 00:18:40", "3.0 GiB", "exports/latest",
        "132,735", "curation: exact", "cannot be used", "3 shards made on the way", "  name: demo", "2.13.0",
        "2 pizzas", "Sure!", "0.6250", "token accuracy", "0.7500", "1 ended by a failure",
    ):  # fmt: skip
        assert said in shown, said
    charts = re.findall(r"<figcaption>([^<]*)<", page)
    assert charts == [
        "Loss a trained token", "Tokens a second", "Norm of the gradient", "Learning rate", "Seconds a step",
        "Waiting for data", "Goodput", "Workers over time", "Checkpoints over time",
    ]  # fmt: skip


def test_a_run_of_10_000_steps_and_50_attempts_makes_a_small_page_at_once() -> None:
    ledger = [LedgerEntry(float(n), n, AttemptBegan(world_size=2, start_step=200 * (n - 1))) for n in range(1, 51)]
    steps = {step: row(step, attempt=1 + (step - 1) // 200) for step in range(1, 10_001)}
    began = time.process_time()
    page = render_run_page(files_of(steps, {}, ledger))
    assert time.process_time() - began < 2
    check_inert(page)
    assert len(page) < 500_000


def test_an_overlong_ledger_is_cut() -> None:
    ledger = [LedgerEntry(float(n), n, AttemptBegan(world_size=2, start_step=0)) for n in range(5000)]
    assert render_run_page(files_of(rows(3), {}, ledger)).count("<tr>") < 450


def test_rows_of_other_metrics_and_no_numbers_are_shown_without_them() -> None:
    steps = rows(4) | {2: row(2, loss=float("nan")), 3: row(3, loss=None)}
    measured: dict[int, dict[str, float | None]] = {0: {"eval_loss": 2.5}, 2: {"eval_loss": None}, 4: {"bleu": 0.5}}
    page = render_run_page(files_of(steps, {step: EvalRow(step, 1, m) for step, m in measured.items()}))
    check_inert(page)
    assert "nan" not in page.lower().replace("dominant", "")


def test_hostile_text_stays_inert() -> None:
    hostile = '<script>alert(1)</script>" onload="x \x1b[2J\u202e $x_1$ url(http://e)'
    status = {
        **STATUS, "run_id": hostile, "error": {"type": hostile, "message": hostile}, "exports": [hostile],
        "checkpoints": [{"step": 1, "path": hostile}], "result": {"comparison": {hostile: {hostile: 1.0}, "b": {}}},
    }  # fmt: skip
    ledger = [
        LedgerEntry.from_dict({"time": 1.0, "event": "attempt", "attempt": 1, "world_size": 1, "start_step": 0}),
        LedgerEntry.from_dict({"time": 1.0, "event": hostile, "attempt": hostile, hostile: {hostile: hostile}}),
    ]
    steps = {step: row(step, metrics={hostile: 1.0}) for step in (1, 2)}
    evals = {step: EvalRow(step, 1, {hostile: float(step)}) for step in (1, 2)}
    page = render_run_page(
        files_of(
            steps,
            evals,
            ledger,
            status,
            config_text=hostile,
            versions={hostile: hostile},
            answers=[{"prompt": hostile, "reference": [{"content": hostile}], hostile: hostile}],
            data=[SplitSummary(hostile, 1, COUNTS, {hostile: 1})],
            export_names={hostile: hostile},
            checkpoints=[replace(ENTRY, path=hostile, tags=(hostile,))],
        )
    )
    check_inert(page)
    files = files_of(steps, evals, ledger, status)
    check_inert(compare.render_page([hostile, hostile], [files, files]))


def test_attempts_tell_what_ended_them_and_how_long_the_next_one_took() -> None:
    entries = [
        {"time": 0.0, "event": "attempt", "attempt": 1, "world_size": 3, "start_step": 0},
        {"time": 10.0, "event": "loaded", "attempt": 1, "step": 0, "num_bytes": 0, "notes": []},
        {"time": 100.0, "event": "rank_failed", "attempt": 1, "rank": 2, "step": 5, "type": "StalledError",
         "message": "no progress"},
        {"time": 101.0, "event": "recovering", "attempt": 1, "step": 5, "wait_s": 0, "reason": "restart 1 of 20",
         "cause": {"type": "StalledError", "message": "no progress"}},
        {"time": 105.0, "event": "attempt", "attempt": 2, "world_size": 2, "start_step": 4},
        {"time": 112.5, "event": "loaded", "attempt": 2, "step": 4, "num_bytes": 0, "notes": []},
        {"time": 150.0, "event": "resizing", "attempt": 2, "step": 9, "reason": "room for 3 workers"},
        {"time": 160.0, "event": "attempt", "attempt": 3, "world_size": 3, "start_step": 9},
    ]  # fmt: skip
    steps = {step: row(step, attempt=1 if step <= 4 else 2) for step in range(1, 10)}
    first, second, third = attempts_of([LedgerEntry.from_dict(entry) for entry in entries], steps)
    assert (first.ending, first.is_failure, first.ended) == ("rank 2: StalledError: no progress", True, 100.0)
    assert (second.ending, second.is_failure, second.recovery_s) == ("resize: room for 3 workers", False, 12.5)
    assert (second.start_step, second.end_step, third.end_step, third.ending) == (4, 9, 9, "")
    assert bands_of(steps) == [(1, 1, 4), (2, 5, 9)]


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
    assert "Loss a trained token" in first
    assert capsys.readouterr().out.split() == [str(run / "report.html"), str(tmp_path / "page.html")]


def test_a_run_that_has_just_begun_has_a_page(run: Path, call: Call) -> None:
    assert call(str(run)) == 0
    check_inert((run / "report.html").read_text())


def test_what_is_no_run_ends_with_2(call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(str(tmp_path)) == 2
    assert "is not a run directory" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()
