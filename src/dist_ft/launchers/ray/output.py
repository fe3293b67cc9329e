"""Follows a Ray job to its end: its output, its result, its exit code, and what Ctrl-C means meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from ray.job_submission import JobDetails, JobStatus

from dist_ft.errors import DistFtError
from dist_ft.run.outcome import RunResult

_RESULT_START = '{"run_dir": '
_KNOWN_CODES = (0, 1, 2, 3)
_RECONNECT_S = (1.0, 2.0, 5.0, 10.0, 20.0)
_SILENCE_LIMIT_S = 120.0
_POLL_S = 0.5


class Jobs(Protocol):
    """What of a `JobServer` is needed here."""

    address: str

    def info(self, submission_id: str) -> JobDetails: ...

    def stop(self, submission_id: str) -> None: ...

    def tail(self, submission_id: str) -> AsyncIterator[str]: ...


@dataclass(frozen=True)
class Ended:
    """How a job ended.

    Attributes:
        exit_code: That of `dist-ft train` in the job.
        result: What it printed as its result; None where it did not come so far.
        reason: Why there is no result, for the user.
    """

    exit_code: int
    result: RunResult | None = None
    reason: str | None = None


class Output:
    """Prints the lines of a job's log as they come, each once, but for the result that `train --json` prints last.

    Attributes:
        result: That result, once it has come.
        num_seen: Characters of the log so far.
    """

    def __init__(self) -> None:
        self.result: RunResult | None = None
        self.num_seen = 0
        self._num_skipped = 0
        self._rest = ""

    def restart(self) -> None:
        """The log will come again from its beginning."""
        self._num_skipped = self.num_seen

    def add(self, text: str) -> None:
        """Takes the next part of the log."""
        skipped = min(self._num_skipped, len(text))
        self._num_skipped -= skipped
        self.num_seen += len(text) - skipped
        *lines, self._rest = (self._rest + text[skipped:]).split("\n")
        for line in lines:
            self._show(line)

    def close(self) -> None:
        """Shows a last line that does not end in a line break."""
        if self._rest:
            self._show(self._rest)
        self._rest = ""

    def _show(self, line: str) -> None:
        found = find_result(line)
        if found is None:
            print(line, flush=True)
        else:
            self.result = found


def find_result(log: str) -> RunResult | None:
    """Returns the result of a `train --json`, if a line of the log is one."""
    for line in reversed(log.splitlines()):
        if line.startswith(_RESULT_START):
            with contextlib.suppress(ValueError):
                return RunResult.from_json(line)
    return None


def follow(jobs: Jobs, submission_id: str) -> Ended | None:
    """Shows a job's output until it ends; None when the user would rather not wait.

    Raises:
        UsageError: There is no such job.
        DistFtError: The job server cannot be reached any more; the job may go on.
        KeyboardInterrupt: Ctrl-C where nobody can be asked, or once more when asked.
    """
    jobs.info(submission_id)
    output = Output()
    failures = 0
    while True:
        num_seen = output.num_seen
        try:
            asyncio.run(_show_all(jobs, submission_id, output))
            if (details := jobs.info(submission_id)).status.is_terminal():
                break
        except KeyboardInterrupt:
            choice = _ask(f"dist-ft logs {submission_id} --address {jobs.address} --follow")
            if choice == "d":
                return None
            if choice == "s":
                jobs.stop(submission_id)
                print("stopping after a checkpoint", file=sys.stderr)
        except TimeoutError:
            pass  # a job with nothing to say, or a cable that was pulled: a new connection tells
        except DistFtError as error:
            failures = 0 if output.num_seen > num_seen else failures
            if failures == len(_RECONNECT_S):
                raise DistFtError(f"{error}; whether the job goes on is not known") from error
            time.sleep(_RECONNECT_S[failures])
            failures += 1
        output.restart()
    output.close()
    return how_it_ended(details, output.result)


def wait_for_end(jobs: Jobs, submission_id: str, limit_s: float) -> JobDetails:
    """Waits until a job has ended.

    Raises:
        DistFtError: It did not within the limit.
    """
    deadline = time.monotonic() + limit_s
    while not (details := jobs.info(submission_id)).status.is_terminal():
        if time.monotonic() > deadline:
            raise DistFtError(f"job {submission_id} is still {details.status.value} after {limit_s:g} s")
        time.sleep(_POLL_S)
    return details


def how_it_ended(details: JobDetails, result: RunResult | None) -> Ended:
    """Maps what Ray says of a job that has ended to an exit code of ours."""
    code = details.driver_exit_code
    if details.status == JobStatus.STOPPED:  # Ray keeps no exit code of a job that it was asked to stop
        if result is None:
            return Ended(1, reason="it was stopped before it had a result; --resume goes on after the last checkpoint")
        return Ended({"completed": 0, "stopped": 3}.get(result.state, 1), result)
    if details.status == JobStatus.SUCCEEDED or code in _KNOWN_CODES:
        return Ended(code or 0, result)
    if code in (126, 127):
        return Ended(1, reason="the head has no `dist-ft` on its PATH; start its Ray from the environment that has it")
    if code is not None:
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return Ended(1, result, f"its driver {how}; --resume goes on after the last checkpoint")
    return Ended(1, result, (details.message or "Ray gives no reason").splitlines()[0])


async def _show_all(jobs: Jobs, submission_id: str, output: Output) -> None:
    parts = aiter(jobs.tail(submission_id))
    while True:
        async with asyncio.timeout(_SILENCE_LIMIT_S):
            text = await anext(parts, None)
        if text is None:
            return
        output.add(text)


def _ask(command: str) -> str:
    """Asks what Ctrl-C means: `d` to detach, `s` to stop, anything else to go on."""
    print(f"\nthe job goes on; to see it again: {command}", file=sys.stderr)
    if not sys.stdin.isatty():
        raise KeyboardInterrupt
    try:
        return input("[d]etach, [s]top after a checkpoint, or Enter to go on following: ").strip().lower()[:1]
    except EOFError:
        return "d"
