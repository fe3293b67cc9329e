"""From a config's path to a checked config, and to its prepared data."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dist_ft.errors import UsageError

if TYPE_CHECKING:  # pydantic is not loaded to print the help
    from dist_ft.config import Config
    from dist_ft.jobs.spec import Preparation


def compiled(pattern: str | None) -> re.Pattern[str] | None:
    """Return a regular expression of the command line.

    Raises:
        UsageError: It is none.
    """
    try:
        return None if pattern is None else re.compile(pattern)
    except re.error as error:
        raise UsageError(f"--grep {pattern!r} is not a regular expression: {error}") from error


def load_checked(path: Path, overrides: list[str] | None) -> Config:
    """Return a config whose rules hold on this machine, with absolute paths and the adapter's own settings.

    Raises:
        ConfigError: With every problem, one a line.
    """
    from dist_ft.config import check_config, load_config, with_absolute_paths, with_adapter_settings

    config = load_config(path, overrides or [])
    check_config(config)
    return with_absolute_paths(with_adapter_settings(config))


def prepare_here(config: Config) -> Preparation:
    """Check model and data and make the token shards that are missing: a few here, many on all cores."""
    quieten()
    from dist_ft.jobs.prepare import prepare, prepare_or_list
    from dist_ft.jobs.spec import MissingShards
    from dist_ft.orchestrate.without_cluster import make_shards_here
    from dist_ft.report.console import Console

    found = prepare_or_list(config)
    if not isinstance(found, MissingShards):
        return found
    console = Console()
    try:
        make_shards_here(config, found.jobs, console.progress)
    finally:
        console.close()
    return replace(prepare(config), num_made=len(found.jobs))


def quieten() -> None:
    """Silences progress bars and notes of libraries; call it before transformers is imported."""
    from dist_ft.orchestrate.workers.processes import QUIET_ENV

    os.environ.update(QUIET_ENV)
