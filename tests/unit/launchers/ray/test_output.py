"""What is shown of a job, what comes of it, and what Ctrl-C does."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from dataclasses import asdict, replace

import pytest
from ray.job_submission import JobDetails, JobStatus, JobType

from dist_ft.errors import DistFtError
from dist_ft.launchers.ray import output
from dist_ft.launchers.ray.output import follow, how_it_ended
from dist_ft.run.outcome import RunResult

RESULT = RunResult("/runs/a", "completed", 3)
STOPPED = replace(RESULT, state="stopped")
LOG = f"one\ntwo\n{json.dumps(asdict(RESULT))}\n"


def details(status: str, code: int | None = None, message: str = "") -> JobDetails:
    return JobDetails(
        type=JobType.SUBMISSION, status=JobStatus(status), entrypoint="", driver_exit_code=code, message=message
    )


class Jobs:
    """A job whose log comes in the given parts; an exception among them breaks the connection."""

    address = "http://127.0.0.1:8265"

    def __init__(self, *connections: list[str | BaseException], ended: JobDetails | None = None) -> None:
        self._connections = list(connections)
        self._ended = ended or details("SUCCEEDED", 0)
        self.num_stops = 0

    def info(self, submission_id: str) -> JobDetails:
        return details("RUNNING") if self._connections else self._ended

    def stop(self, submission_id: str) -> None:
        self.num_stops += 1

    async def tail(self, submission_id: str) -> AsyncIterator[str]:
        for part in self._connections.pop(0):
            if isinstance(part, BaseException):
                raise part
            yield part


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "_RECONNECT_S", (0.0, 0.0))


@pytest.mark.parametrize("cut", range(len(LOG)))
def test_every_line_is_shown_once_and_the_result_is_kept_wherever_a_connection_breaks(
    cut: int, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = follow(Jobs([LOG[:cut], DistFtError("lost")], [LOG[: cut // 2], LOG[cut // 2 :]]), "a-1")
    assert ended is not None
    assert (ended.exit_code, ended.result) == (0, RESULT)
    assert capsys.readouterr().out == "one\ntwo\n"


def test_a_connection_that_ends_before_the_job_is_made_again(capsys: pytest.CaptureFixture[str]) -> None:
    ended = follow(Jobs(["one\n"], ["one\n", TimeoutError()], [LOG]), "a-1")
    assert ended is not None
    assert ended.result == RESULT
    assert capsys.readouterr().out == "one\ntwo\n"


def test_a_server_that_stays_away_is_an_error() -> None:
    gone: list[str | BaseException] = [DistFtError("lost")]
    with pytest.raises(DistFtError, match="lost"):
        follow(Jobs(["one\n", *gone], gone, gone, gone), "a-1")


@pytest.mark.parametrize(
    ("job", "result", "code"),
    [
        (details("SUCCEEDED", 0), RESULT, 0),
        (details("FAILED", 1), RESULT, 1),
        (details("FAILED", 2), None, 2),
        (details("FAILED", 3), STOPPED, 3),
        (details("STOPPED"), STOPPED, 3),
        (details("STOPPED"), RESULT, 0),
        (details("STOPPED"), replace(RESULT, state="failed"), 1),
    ],
)
def test_the_exit_code_is_that_of_the_run(job: JobDetails, result: RunResult | None, code: int) -> None:
    ended = how_it_ended(job, result)
    assert (ended.exit_code, ended.result, ended.reason) == (code, result, None)


@pytest.mark.parametrize(
    ("job", "reason"),
    [
        (details("STOPPED"), "before it had a result"),
        (details("FAILED", 127), "no `dist-ft` on its PATH"),
        (
            details("FAILED", -9, "Job entrypoint command failed with exit code -9"),
            "killed by signal 9; --resume",
        ),
        (details("FAILED", None, "the node died\nmore"), "the node died$"),
    ],
)
def test_a_job_that_ends_without_a_result_is_a_failure_with_a_reason(job: JobDetails, reason: str) -> None:
    ended = how_it_ended(job, None)
    assert ended.exit_code == 1
    assert ended.reason is not None
    assert re.search(reason, ended.reason)


def answer(monkeypatch: pytest.MonkeyPatch, *answers: str | BaseException) -> None:
    given = list(answers)

    def reply(prompt: str) -> str:
        found = given.pop(0)
        if isinstance(found, BaseException):
            raise found
        return found

    monkeypatch.setattr("builtins.input", reply)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)


def test_ctrl_c_can_stop_the_job_and_sees_it_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, "", "s")
    log = f"one\n{json.dumps(asdict(STOPPED))}\n"
    jobs = Jobs(["one\n", KeyboardInterrupt()], ["one\n", KeyboardInterrupt()], [log], ended=details("STOPPED"))
    ended = follow(jobs, "a-1")
    assert ended is not None
    assert (ended.exit_code, jobs.num_stops) == (3, 1)


def test_ctrl_c_can_leave_the_job_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, "d")
    jobs = Jobs(["one\n", KeyboardInterrupt()])
    assert follow(jobs, "a-1") is None
    assert jobs.num_stops == 0


def test_a_second_ctrl_c_leaves_the_job_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, KeyboardInterrupt())
    jobs = Jobs([KeyboardInterrupt()])
    with pytest.raises(KeyboardInterrupt):
        follow(jobs, "a-1")
    assert jobs.num_stops == 0


def test_ctrl_c_asks_nobody_where_nobody_can_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: False)
    jobs = Jobs([KeyboardInterrupt()])
    with pytest.raises(KeyboardInterrupt):
        follow(jobs, "a-1")
    assert jobs.num_stops == 0
