"""The time of each fault, said at the end of the session."""

from __future__ import annotations

import pytest

TIMES = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TIMES] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for line in config.stash[TIMES]:
        terminalreporter.write_line(line)


@pytest.fixture
def say(request: pytest.FixtureRequest) -> object:
    """Notes a line for the end of the session."""
    return request.config.stash[TIMES].append
