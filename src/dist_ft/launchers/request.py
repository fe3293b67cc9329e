"""What `dist-ft submit` asks of a launcher, the same for all of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class SubmitRequest:
    """A run to be started elsewhere.

    Attributes:
        config_path: The config as the user named it.
        overrides: `a.b=value`, as on the command line.
        resume: Go on after the last checkpoint.
        follow: Show its output until it ends.
    """

    config_path: Path
    overrides: tuple[str, ...] = ()
    resume: bool = False
    follow: bool = False
