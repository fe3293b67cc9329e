"""Fixtures of the coordinator's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_ft.run.place import open_run
from tests.helpers.simulated_run import SimulatedRun


@pytest.fixture
def run(tmp_path: Path) -> SimulatedRun:
    return SimulatedRun(open_run(tmp_path / "run"))
