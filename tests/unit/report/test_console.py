"""What a person is shown; nothing that a run can report may end it."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dist_ft.config import Config
from dist_ft.coordinator.core import Coordinator
from dist_ft.coordinator.story import describe_event
from dist_ft.messages import Envelope, EvalDone, PhaseChanged, RankDone, RankFailed, RankStarted, StepDone
from dist_ft.metric_rows import EvalRow
from dist_ft.printable import format_duration
from dist_ft.report.console import Console
from dist_ft.run.events import LedgerEntry
from dist_ft.run.place import open_run
from dist_ft.run.run_inputs import RunInputs
from dist_ft.run.state import RunRecord
from dist_ft.slices import Fingerprint
from tests.helpers.rows import step_row


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.9, "0s"),
        (45, "45s"),
        (59.99, "59s"),
        (60, "1m00s"),
        (200, "3m20s"),
        (3599, "59m59s"),
        (3600, "1h00m"),
        (7500, "2h05m"),
        (360_000, "100h00m"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


EVENTS: list[tuple[dict[str, Any], str | None]] = [
    ({"event": "attempt", "attempt": 1, "world_size": 2, "start_step": 0}, "attempt 1 on 2 workers"),
    (
        {"event": "attempt", "attempt": 2, "world_size": 3, "start_step": 40},
        "attempt 2 on 3 workers, going on after step 40",
    ),
    ({"event": "commit", "step": 40, "attempt": 1}, "checkpoint at step 40"),
    ({"event": "stop_requested", "reason": "SIGTERM"}, "stopping after this step (SIGTERM)"),
    (
        {"event": "checkpoint_damaged", "step": 40, "error": "x is missing"},
        "a checkpoint is damaged and passed over: x is missing",
    ),
    (
        {"event": "rank_failed", "rank": 1, "step": 7, "type": "T", "message": "died"},
        "rank 1 failed after step 7: died",
    ),
    ({"event": "settings_changed", "changes": ["a.b: 1 → 2"]}, "changed since the last attempt: a.b: 1 → 2"),
    ({"event": "loaded", "step": 0, "num_bytes": 0, "notes": []}, None),
    ({"event": "loaded", "step": 4, "num_bytes": 96, "notes": ["workers: 2 → 3", "b"]}, "workers: 2 → 3; b"),
    ({"event": "completed", "step": 60}, None),
    (
        {"event": "save_failed", "step": 40, "reason": "disk full"},
        "the checkpoint of step 40 failed and is left out: disk full",
    ),
    (
        {"event": "save_skipped", "step": 20},
        "no checkpoint of step 20: the one before is still being written",
    ),
    (
        {"event": "early_stop", "step": 40, "best_step": 20, "patience": 2, "metric": "eval_loss"},
        "early stop after step 40 (patience 2 for eval_loss); the best is step 20",
    ),
    (
        {"event": "early_stop", "step": 20, "best_step": None, "patience": 2, "metric": "eval_loss"},
        "early stop after step 20 (patience 2 for eval_loss); none was a number",
    ),
    ({"event": "skip_batch", "step": 8}, "step 8 is left out from now on"),
    (
        {"event": "straggler", "rank": 1, "times_slower": 2.5, "node_ip": "10.0.0.9"},
        "rank 1 on 10.0.0.9 is 2.5 times as slow as the others",
    ),
    (
        {"event": "resizing", "step": 5, "reason": "room for 2 workers"},
        "a checkpoint after this step, then the group is formed anew: room for 2 workers",
    ),
    ({"event": "from a later version"}, None),
]


@pytest.mark.parametrize(("entry", "line"), EVENTS)
def test_ledger_entries(entry: dict[str, Any], line: str | None) -> None:
    assert describe_event(LedgerEntry.from_dict({"time": 0.0, **entry})) == line


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


Screen = Callable[[], io.StringIO]


@pytest.fixture(params=["plain", "terminal"])
def screen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Screen:
    """Puts a screen in place of standard error, when called: pytest has its own there between the phases."""

    def place() -> io.StringIO:
        stream = _Terminal() if request.param == "terminal" else io.StringIO()
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "200")
        return stream

    return place


def _coordinator(path: Path) -> Coordinator:
    config = Config.model_validate(
        {
            "run": {"name": "run"},
            "model": {"name": "tiny-random"},
            "data": {"train": [{"source": "embedded:orders/train"}]},
            "monitor": {"wandb": "disabled"},
        }
    )
    mark = Fingerprint("m", "d", 0, "kind=full", 8)
    inputs = RunInputs((), None, mark, max_steps=2, num_positions=16)
    return Coordinator(config, open_run(path), RunRecord("run", max_steps=2), inputs)


def _show_a_run(console: Console, path: Path) -> None:
    """Shows every status of a run with two attempts, a failure and markup in its messages."""
    coordinator = _coordinator(path)
    num_known = 0

    def update() -> None:  # as the driver does: each entry is asked for once
        nonlocal num_known
        status = coordinator.status(num_known)
        num_known += len(status.ledger)
        console.update(status)

    def send(rank: int, message: Any) -> None:
        coordinator.handle(Envelope("run", number, rank, message), 0.0)
        update()

    update()
    for number in (1, 2):
        coordinator.open_attempt(2, 0.0)
        update()
        for rank in range(2):
            send(rank, RankStarted(1, "10.0.0.1"))
            send(rank, PhaseChanged("first_step", 0))
        send(0, EvalDone(EvalRow(0, number, {"eval_loss": 5.5})))
        send(0, StepDone(step_row(1, number), []))
        if number == 1:
            send(1, RankFailed({"type": "WorkerCrashError", "message": "[bold] /etc [/] {x}\nsecond line"}))
    coordinator.request_stop("SIGINT")
    send(0, StepDone(step_row(2, 2, loss=float("nan")), []))
    for rank in range(2):
        send(rank, RankDone("stopped", 2))
    coordinator.finish("stopped", {})
    update()
    console.close()
    console.close()


def test_every_status_of_a_run_is_shown(screen: Screen, tmp_path: Path) -> None:
    stream = screen()
    _show_a_run(Console(), tmp_path)
    shown = stream.getvalue()
    for part in (
        "attempt 1 on 2 workers",
        "rank 1 failed after step 1: [bold] /etc [/] {x}",
        "attempt 2 on 2 workers",
        "held-out loss 5.5000 at step 0",
        "loss nan",
    ):
        assert part in shown
    assert shown.count("attempt 1 on 2 workers") == 1


def test_a_quiet_console_says_nothing(screen: Screen, tmp_path: Path) -> None:
    stream = screen()
    _show_a_run(Console(is_quiet=True), tmp_path)
    assert stream.getvalue() == ""


def test_results_are_left_to_standard_output(
    screen: Screen, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    screen()
    _show_a_run(Console(), tmp_path)
    assert capsys.readouterr().out == ""


def test_a_run_that_is_longer_than_planned_is_shown(screen: Screen, tmp_path: Path) -> None:
    screen()
    coordinator = _coordinator(tmp_path)
    console = Console()
    status = coordinator.status()
    for step, max_steps in [(0, 0), (1, 0), (5, 2), (3, 2)]:
        record = replace(status.record, step=step, max_steps=max_steps)
        console.update(replace(status, record=record, row=step_row(step)))
    console.close()


def test_an_evaluation_of_metrics_alone_is_shown(screen: Screen, tmp_path: Path) -> None:
    screen()
    coordinator = _coordinator(tmp_path)
    coordinator.record_evaluation(EvalRow(0, 0, {"exact_match": 0.5, "perplexity": None}))
    Console().update(coordinator.status())


def test_what_a_message_quotes_cannot_steer_the_terminal(screen: Screen) -> None:
    stream = screen()
    Console().say("  rank 1 failed: \x1b]0;title\x07 \x00 \u202e\nsecond line " + "x" * 1_000_000)
    shown = stream.getvalue()
    assert r"rank 1 failed: \x1b]0;title\x07 \x00 \u202e" in shown
    assert "second line xxx" in shown.splitlines()[1]
    assert len(shown) < 5000
