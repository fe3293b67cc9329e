"""Follows a Ray job to its end: prints its output, returns its result and exit code, and handles Ctrl-C."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from typing import Protocol

from ray.job_submission import JobDetails, JobStatus

from dist_ft.errors import DistFtError
from dist_ft.launchers.job_output import Output
from dist_ft.launchers.launcher import Ended
from dist_ft.run.outcome import RunResult

_KNOWN_CODES = (0, 1, 2, 3)
_RECONNECT_S = (1.0, 2.0, 5.0, 10.0, 20.0)
_SILENCE_LIMIT_S = 120.0
_POLL_S = 0.5


class Jobs(Protocol):
    """The methods of `JobServer` that following needs."""

    address: str

    def info(self, submission_id: str) -> JobDetails: ...

    def stop(self, submission_id: str) -> None: ...

    def tail(self, submission_id: str) -> AsyncIterator[str]: ...


def follow(jobs: Jobs, submission_id: str) -> Ended | None:
    """Print a job's output until it ends. Returns None if the user detaches.

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
    """Wait until a job has ended.

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
    """Map Ray's record of a job that has ended to an exit code of dist-ft."""
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
    """Asks the user what Ctrl-C means: `d` to detach, `s` to stop, anything else to go on."""
    print(f"\nthe job goes on; to see it again: {command}", file=sys.stderr)
    if not sys.stdin.isatty():
        raise KeyboardInterrupt
    try:
        return input("[d]etach, [s]top after a checkpoint, or Enter to go on following: ").strip().lower()[:1]
    except EOFError:
        return "d"
