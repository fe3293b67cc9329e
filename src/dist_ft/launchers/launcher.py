"""Defines the protocol of launchers, and the types of its arguments and results.

A launcher starts runs elsewhere. The command line holds the table of launchers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dist_ft.config import Config, check_config, load_config, with_absolute_paths, with_adapter_settings
from dist_ft.errors import DistFtError, UsageError
from dist_ft.model.intact import check_files
from dist_ft.printable import printable
from dist_ft.run.outcome import RunResult
from dist_ft.run.place import check_new_run

STOP_ENV = {
    # Ray's default is 3 s, then SIGKILL.
    "RAY_JOB_STOP_WAIT_TIME_S": "900",
    # Ray signals all descendants of the driver. Its fork server and the ranks take SIGINT for the driver's affair;
    # SIGTERM would end the server, and tell ranks that their machine is about to leave.
    "RAY_JOB_STOP_SIGNAL": "SIGINT",
}
"""Environment of a Ray job, however it is submitted, so that a stop makes a checkpoint first."""
_MESSAGE = 500  # characters; Ray adds the end of the log


class RunAtWorkError(UsageError):
    """A run that was submitted while an earlier submission of it is not over.

    Attributes:
        job: Name of that submission, for `status`, `logs` and `stop`.
    """

    def __init__(self, message: str, job: str = "") -> None:
        super().__init__(message)
        self.job = job


@dataclass(frozen=True)
class SubmitRequest:
    """A run to be started elsewhere.

    Attributes:
        config_path: The config as the user named it.
        overrides: `a.b=value`, as on the command line.
        resume: Go on after the last checkpoint.
        preflight: Before it starts, look at every node there.
    """

    config_path: Path
    overrides: tuple[str, ...] = ()
    resume: bool = False
    preflight: bool = True

    @property
    def train_options(self) -> list[str]:
        """Options for `dist-ft train`."""
        return [*(["--resume"] if self.resume else []), *(["--preflight"] if self.preflight else [])]

    def load_checked(self, *more: str) -> Config:
        """Load and check the config of a run whose data, model and run directory this machine sees.

        Its paths are absolute then.

        Args:
            *more: Overrides of the launcher.

        Raises:
            UserError: A rule is broken, a file of the model is not whole, or the run directory is taken and the run is
                not to go on.
        """
        config = load_config(self.config_path, [*self.overrides, *more])
        check_config(config)
        with_adapter_settings(config)  # a contradiction is told here; the keys themselves are settled by the run
        config = with_absolute_paths(config)
        if Path(config.model.name).is_dir():
            check_files(Path(config.model.name), f"model.name={config.model.name}")
        if not self.resume:
            check_new_run(config)
        return config


@dataclass(frozen=True)
class Submitted:
    """A run that a launcher has accepted.

    Attributes:
        job: Its name for `status`, `logs` and `stop`.
        run_dir: Path or URL of the run, as it is seen where the run is.
        address: URL of the Ray dashboard that must be named beside `job`, if any.
        warnings: Lines for the user.
    """

    job: str
    run_dir: str
    address: str | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """What a launcher knows of a run that it has accepted.

    Attributes:
        submission_id: Name of the job.
        job_state: In the launcher's own words.
        is_over: Whether it has ended, and will not begin again by itself.
        exit_code: That of `dist-ft train`; None until it is over, or where nobody knows.
        message: What the launcher says beside the state.
        run_dir: Path or URL of the run, where the job says so.
        run_id: Name of the run, where the job says so.
        log: File that the job writes to, where there is one.
        restarts: How often the launcher has begun it again.
    """

    submission_id: str
    job_state: str
    is_over: bool
    exit_code: int | None = None
    message: str | None = None
    run_dir: str | None = None
    run_id: str | None = None
    log: str | None = None
    restarts: int = 0

    def describe(self) -> str:
        """Return one line for a terminal."""
        code = "" if self.exit_code is None else f", exit code {self.exit_code}"
        requeued = f", requeued {self.restarts} times" if self.restarts else ""
        message = f": {printable(self.message.splitlines()[0], _MESSAGE)}" if self.message else ""
        log = f"; output in {self.log}" if self.log else ""
        return f"{self.submission_id}: {self.job_state}{code}{requeued}{message}{log}"


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

    def describe_stop(self, job: str) -> str:
        """Return one line for a job that was asked to stop.

        Raises:
            DistFtError: It has no result, or failed.
        """
        if self.result is None:
            raise DistFtError(f"job {job}: {self.reason or f'exit code {self.exit_code}'}")
        line = f"{self.result.state} at step {self.result.steps}: {self.result.run_dir}"
        if self.exit_code not in (0, 3):
            raise DistFtError(line)
        return line


class Launcher(Protocol):
    """Starts runs in one kind of place, and looks after them by name.

    The methods that take a job raise `UsageError` where there is no such job (any more), and `DistFtError` where
    nobody answers.
    """

    def submit(self, request: SubmitRequest) -> Submitted:
        """Start a run, and return as soon as the place has accepted it.

        Raises:
            UserError: Nothing was started: the config breaks a rule, or the run is at work already.
            DistFtError: The place refuses it.
        """
        ...

    def status(self, job: str) -> Job:
        """Return what is known of a job."""
        ...

    def logs(self, job: str) -> str:
        """Return what a job has written so far."""
        ...

    def stop(self, job: str, timeout_s: float) -> str:
        """Stop a job after a checkpoint, wait for its end, and return a line that says how it ended.

        Raises:
            UsageError: It has ended already.
            DistFtError: It did not end in time, or otherwise than asked.
        """
        ...

    def follow(self, job: str) -> Ended | None:
        """Print the output of a job until it ends. Returns None if the user detaches.

        Ctrl-C ends the following, not the job.
        """
        ...
