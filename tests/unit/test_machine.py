"""The arithmetic of workers per node, which planning, launchers, doctor and the elastic policy share; and a home."""

from __future__ import annotations

import os
import pwd
import tempfile
from pathlib import Path

import pytest

from dist_ft import machine
from dist_ft.errors import UsageError
from dist_ft.layout import user_cache_dir
from dist_ft.machine import home_env, worker_resources, workers_on


@pytest.mark.parametrize(
    ("asked", "has_gpu", "expected"),
    [
        (None, True, {"GPU": 1.0, "CPU": 1.0}),
        (None, False, {"CPU": 1.0}),
        ({}, True, {"GPU": 1.0, "CPU": 1.0}),
        ({"CPU": 4.0}, True, {"CPU": 4.0}),  # workers on the CPUs of machines with GPUs
        ({"GPU": 0.5}, False, {"GPU": 0.5}),
    ],
)
def test_a_worker_needs_what_is_asked_or_one_device(
    asked: dict[str, float] | None, has_gpu: bool, expected: dict[str, float]
) -> None:
    assert worker_resources(asked, has_gpu=has_gpu) == expected


@pytest.mark.parametrize(
    ("node", "worker", "count"),
    [
        ({"CPU": 4.0}, {"CPU": 1.0}, 4),
        ({"CPU": 7.0}, {"CPU": 2.0}, 3),
        ({"CPU": 2.0, "GPU": 8.0}, {"GPU": 1.0, "CPU": 1.0}, 2),  # the scarcest decides
        ({"CPU": 64.0, "GPU": 8.0}, {"GPU": 1.0, "CPU": 1.0}, 8),
        ({"CPU": 64.0}, {"GPU": 1.0, "CPU": 1.0}, 0),
        ({"GPU": 1.0}, {"GPU": 0.5}, 2),
        ({"CPU": 1.9999999}, {"CPU": 1.0}, 2),  # what Ray leaves after giving and taking back
        ({"CPU": 1.99}, {"CPU": 1.0}, 1),
        ({}, {"CPU": 1.0}, 0),
        ({"CPU": 4.0}, {"CPU": 0.0}, None),
        ({"CPU": 4.0}, {}, None),
        ({"CPU": 4.0}, {"CPU": 2.0, "TPU": 0.0}, 2),
    ],
)
def test_a_node_holds_whole_workers(node: dict[str, float], worker: dict[str, float], count: int | None) -> None:
    assert workers_on(node, worker) == count


@pytest.fixture
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user without a home, a name and an entry in /etc/passwd; returns the temp directory."""
    for name in ("HOME", "XDG_CACHE_HOME", "USER", "LOGNAME", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)

    def getpwuid(uid: int) -> object:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", getpwuid)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_user_without_a_home_gets_a_folder_of_his_own(nobody: Path) -> None:
    own = nobody / f"dist-ft-home-{os.getuid()}"
    assert home_env() == {"HOME": str(own), "USER": str(os.getuid())}
    assert own.stat().st_mode & 0o777 == 0o700
    assert user_cache_dir() == own / ".cache" / "dist-ft"


def test_a_home_that_cannot_be_written_leaves_credentials_where_they_are(
    nobody: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/")
    monkeypatch.setenv("USER", "ann")
    monkeypatch.setattr(machine, "can_write", lambda path: not path.is_relative_to("/.cache"))
    own = nobody / f"dist-ft-home-{os.getuid()}"
    assert home_env() == {"XDG_CACHE_HOME": str(own / "cache")}
    assert user_cache_dir() == own / "cache" / "dist-ft"


@pytest.mark.parametrize("trap", ["a link", "open to all"])
def test_a_folder_that_somebody_else_has_prepared_is_not_used(nobody: Path, trap: str) -> None:
    own = nobody / f"dist-ft-home-{os.getuid()}"
    if trap == "a link":
        (nobody / "elsewhere").mkdir(mode=0o700)
        own.symlink_to(nobody / "elsewhere")
    else:
        own.mkdir()
        own.chmod(0o777)
    with pytest.raises(UsageError, match=r"is not this user's alone; set HOME or XDG_CACHE_HOME"):
        home_env()


def test_with_a_home_nothing_is_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "made-on-demand"))
    assert home_env() == {}
    assert user_cache_dir() == tmp_path / "made-on-demand" / ".cache" / "dist-ft"
