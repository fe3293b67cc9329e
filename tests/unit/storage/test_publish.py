"""Directories made on first use: once, by one of several processes, and never half."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dist_ft.storage.publish import make_once

MAKE = """
import os, sys
from pathlib import Path
from dist_ft.storage.publish import make_once

def make(directory):
    directory.mkdir()
    with open(os.environ["MADE"], "a") as file:
        file.write("x")
    (directory / "config.json").write_text("{}")
    if os.environ.get("DIE"):
        os._exit(9)
    (directory / "model.safetensors").write_text("whole")

print(make_once(Path(sys.argv[1]), make))
"""


def start(directory: Path, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", MAKE, str(directory)],
        env={**os.environ, "MADE": str(directory.parent / "made"), **env},
        stdout=subprocess.PIPE,
        text=True,
    )


def directories(parent: Path) -> list[str]:
    return [path.name for path in parent.iterdir() if path.is_dir()]


def test_a_maker_that_dies_leaves_nothing_that_is_believed_and_the_next_two_make_one(tmp_path: Path) -> None:
    wanted = tmp_path / "model"
    dying = start(wanted, DIE="1")
    dying.communicate(timeout=60)
    assert dying.returncode == 9
    assert not wanted.exists()
    both = [start(wanted), start(wanted)]
    assert {process.communicate(timeout=60)[0].strip() for process in both} == {str(wanted)}
    assert (wanted / "model.safetensors").read_text() == "whole"
    assert (tmp_path / "made").read_text() == "xx", "the one that died, and one of the two"
    assert directories(tmp_path) == ["model"]


def test_a_maker_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(directory: Path) -> None:
        directory.mkdir()
        (directory / "config.json").write_text("{}")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        make_once(tmp_path / "model", fail)
    assert directories(tmp_path) == []
