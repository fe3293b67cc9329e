"""What `dist-ft submit` asks of a launcher, the same for all of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

STOP_ENV = {
    # Ray's default is 3 s, then SIGKILL.
    "RAY_JOB_STOP_WAIT_TIME_S": "900",
    # Ray signals all descendants of the driver. Its fork server and the ranks take SIGINT for the driver's affair;
    # SIGTERM would end the server, and tell ranks that their machine is about to leave.
    "RAY_JOB_STOP_SIGNAL": "SIGINT",
}
"""What a Ray job carries so that a stop is a checkpoint first, however it is submitted."""


@dataclass(frozen=True)
class SubmitRequest:
    """A run to be started elsewhere.

    Attributes:
        config_path: The config as the user named it.
        overrides: `a.b=value`, as on the command line.
        resume: Go on after the last checkpoint.
        follow: Show its output until it ends.
        preflight: Before it starts, look at every node there.
    """

    config_path: Path
    overrides: tuple[str, ...] = ()
    resume: bool = False
    follow: bool = False
    preflight: bool = True

    @property
    def train_options(self) -> list[str]:
        """What `dist-ft train` is given there."""
        return [*(["--resume"] if self.resume else []), *(["--preflight"] if self.preflight else [])]
