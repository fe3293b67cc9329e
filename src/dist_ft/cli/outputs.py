"""What verbs print on the terminal and write to files."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dist_ft.errors import UsageError
from dist_ft.printable import printable

if TYPE_CHECKING:
    from dist_ft.run.outcome import RunResult

_LINE = 2000
"""Characters of a line that quotes data, answers of models or messages of libraries."""


def is_colored(no_color: bool) -> bool:
    """Return whether marks in the output may be colours."""
    return sys.stdout.isatty() and not no_color and not os.environ.get("NO_COLOR")


def check_page(path: Path) -> None:
    """Refuses a page's path that cannot be written, before the work is done."""
    if path.is_dir():
        raise UsageError(f"{path} is a directory; name a file in it")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{path}: no such directory; make {path.absolute().parent} first")


def write_page(path: Path, text: str) -> None:
    """Write a page whole or not at all."""
    from dist_ft.storage.publish import write_whole

    try:
        write_whole(path.absolute(), text)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}; choose another file") from error


def print_result(result: RunResult) -> None:
    """Print how a run ended: its losses, samples and export."""
    if result.error:
        print_error(result.error["message"])
    print(f"{result.state} after {result.steps} steps: {result.run_dir}")
    if result.state == "stopped":
        print("continue with the same command and --resume")
    from dist_ft.report.table import render_comparison, render_samples

    if stop := result.early_stop:
        print(f"early stop: patience {stop['patience']} for {stop['metric']}; the best was step {stop['best_step']}")
    if result.final_loss is not None:
        print(f"training loss {result.final_loss:.4f}")
    for block in (render_comparison(result.comparison), render_samples((result.evaluation or {}).get("samples", []))):
        if block:
            print(f"\n{block}")
    places = [f"{name:16}{path}" for name, path in (("model", result.export_dir), ("best", result.best_dir)) if path]
    if places:
        print("\n" + "\n".join(places))


def print_error(message: str) -> None:
    """Print a message on stderr, each line marked as an error."""
    for line in message.split("\n"):
        print(f"error: {printable(line, _LINE)}", file=sys.stderr)
