"""Runs the command of another program with a time limit, and turns its failures into errors of one line."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence

from dist_ft.errors import DistFtError, UsageError


def run_command(
    command: Sequence[str], *, shown: str, absent: str, question: str, limit_s: float, stdin: str | None = None
) -> str:
    """Return what a command prints.

    Args:
        command: Program and arguments.
        shown: What it is called in an error.
        absent: Follows `<program> is not on PATH; `.
        question: Asked when it does not end.
        limit_s: Seconds that it may take.
        stdin: What it is given to read.

    Raises:
        UsageError: There is no such program.
        DistFtError: It failed, with its own words, or did not end within the limit.
    """
    if shutil.which(command[0]) is None:
        raise UsageError(f"{command[0]} is not on PATH; {absent}")
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, timeout=limit_s)
    except subprocess.TimeoutExpired as error:
        raise DistFtError(f"{shown} did not end within {limit_s:g} s; {question}") from error
    if done.returncode != 0:
        raise DistFtError(f"{shown} failed: {done.stderr.strip() or done.returncode}")
    return done.stdout
