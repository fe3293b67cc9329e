"""`submit`, `status`, `logs` and `stop` with a launcher that is none: what is printed, and the exit codes."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dist_ft.cli import launcher_table
from dist_ft.cli.app import app
from dist_ft.launchers.launcher import Ended, Job, SubmitRequest, Submitted
from dist_ft.layout import RunDir
from dist_ft.run.outcome import RunResult
from dist_ft.run.state import RunRecord
from dist_ft.storage.publish import write_json

RESULT = RunResult("/runs/a", "completed", 3)


class Elsewhere:
    """A launcher whose one job ends as it is told to."""

    def __init__(self, ended: Ended | None = None, run_dir: str | None = "/nowhere/a") -> None:
        self._ended = ended
        self._run_dir = run_dir
        self.requests: list[SubmitRequest] = []

    def submit(self, request: SubmitRequest) -> Submitted:
        self.requests.append(request)
        return Submitted("moon:1", "/nowhere/a", "http://h:1", ("it is dark",))

    def status(self, job: str) -> Job:
        return Job(job, "Dreaming", False, message="of sheep\nelectric", run_dir=self._run_dir, restarts=2)

    def logs(self, job: str) -> str:
        return "one\ntwo"

    def stop(self, job: str, timeout_s: float) -> str:
        return f"stopped {job} within {timeout_s:g}"

    def follow(self, job: str) -> Ended | None:
        return self._ended


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Elsewhere:
    launcher = Elsewhere(Ended(0, RESULT))
    monkeypatch.setitem(launcher_table.LAUNCHERS, "moon", lambda options: launcher)
    return launcher


def call(*words: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, words)
    return done.exit_code, done.stdout, done.stderr


def test_a_submission_says_what_to_do_next(elsewhere: Elsewhere) -> None:
    code, out, err = call("submit", "a.yaml", "x=1", "--to", "moon", "--resume", "--no-preflight")
    assert code == 0
    assert out.splitlines() == [
        "submitted moon:1 to http://h:1; run directory /nowhere/a",
        "  dist-ft status|logs|stop moon:1 --address http://h:1",
    ]
    assert err == "warning: it is dark\n"
    assert elsewhere.requests == [SubmitRequest(Path("a.yaml"), ("x=1",), resume=True, preflight=False)]


@pytest.mark.parametrize(
    ("ended", "code", "out", "err"),
    [
        (Ended(0, RESULT), 0, "completed after 3 steps: /runs/a", ""),
        (Ended(3, replace(RESULT, state="stopped")), 3, "continue with the same command and --resume", ""),
        (Ended(1, reason="the moon fell"), 1, "", "error: the moon fell"),
        (None, 0, "", ""),
    ],
)
def test_who_follows_sees_the_end_and_exits_with_it(
    monkeypatch: pytest.MonkeyPatch, ended: Ended | None, code: int, out: str, err: str
) -> None:
    monkeypatch.setitem(launcher_table.LAUNCHERS, "moon", lambda options: Elsewhere(ended))
    for words in (("submit", "a.yaml", "--to", "moon", "--follow"), ("logs", "moon:1", "--follow")):
        found = call(*words)
        assert found[0] == code
        assert out in found[1] and err in found[2]


def test_a_run_that_cannot_be_seen_is_named(elsewhere: Elsewhere) -> None:
    assert call("status", "moon:1")[1].splitlines() == [
        "moon:1: Dreaming, requeued 2 times: of sheep",
        "  run directory /nowhere/a, not visible from here (or not there yet)",
    ]
    found = json.loads(call("status", "moon:1", "--json")[1])
    assert (found["submission_id"], found["job_state"], found["exit_code"], found["run"]) == (
        "moon:1", "Dreaming", None, None
    )  # fmt: skip


def test_a_run_that_can_be_seen_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    record = RunRecord("a", state="running", attempt=1, step=17, max_steps=40, world_size=2)
    write_json(RunDir(tmp_path).run_json, asdict(record))
    monkeypatch.setitem(launcher_table.LAUNCHERS, "moon", lambda options: Elsewhere(run_dir=str(tmp_path)))
    assert "17 of 40" in call("status", "moon:1")[1]
    assert json.loads(call("status", "moon:1", "--json")[1])["run"]["step"] == 17


def test_logs_and_stop_go_to_the_launcher(elsewhere: Elsewhere) -> None:
    assert call("logs", "moon:1")[1] == "one\ntwo"
    assert call("stop", "moon:1", "--timeout", "5")[1] == "stopped moon:1 within 5\n"
