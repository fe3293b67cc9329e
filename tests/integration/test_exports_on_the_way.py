"""Exports while training goes on: `exports/latest` and `exports/best` load at every moment, also after a kill."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
from safetensors import safe_open

from dist_ft.layout import RunDir
from tests.helpers.paths import ROOT
from tests.helpers.rows import read_rows

CONFIG = ROOT / "configs" / "smoke" / "full.yaml"
SETTINGS = [
    "train.max_steps=18", "checkpoint.every_steps=2", "eval.every_steps=2", "eval.best_metric=eval_loss",
    "export={latest: true, best: true, every_steps: 6}",
]  # fmt: skip


def begin(cli: str, output_dir: Path, address: str, *more: str) -> subprocess.Popen[str]:
    place = [f"run.output_dir={output_dir}", f"cluster.address={address}"]
    command = [cli, "train", str(CONFIG), *place, *SETTINGS, "--json", *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def load(directory: Path) -> int:
    """Reads the whole model as somebody does who serves it; returns the number of tensors."""
    json.loads((directory / "config.json").read_text())
    with safe_open(directory / "model.safetensors", "numpy") as file:
        return len([file.get_tensor(name) for name in file.keys()])  # noqa: SIM118


def look(run: RunDir, seen: dict[str, set[str]]) -> None:
    for name in ("latest", "best", "final"):
        link = run.exports / name
        if link.is_symlink():
            target = link.resolve()  # as a server does, once
            assert load(target) > 0
            seen.setdefault(name, set()).add(target.name)


@pytest.mark.timeout(500)
def test_the_names_load_at_every_moment_and_over_a_killed_driver(cli: str, tmp_path: Path, ray_address: str) -> None:
    run = RunDir(tmp_path / "full")
    seen: dict[str, set[str]] = {}
    driver = begin(cli, tmp_path, ray_address)
    try:
        while driver.poll() is None and not list(run.exports.glob(".step-*")):
            time.sleep(0.02)  # nothing else says from outside that an export is half written
        assert driver.poll() is None, driver.stderr.read() if driver.stderr else ""
        driver.send_signal(signal.SIGKILL)
    finally:
        driver.kill()
        driver.communicate()
    look(run, seen)
    again = begin(cli, tmp_path, ray_address, "--resume")
    try:
        while True:
            look(run, seen)
            try:
                again.wait(0.2)
                break
            except subprocess.TimeoutExpired:
                continue
    finally:
        again.kill()
    out, errors = again.communicate()
    assert again.returncode == 0, errors
    result = json.loads(out.splitlines()[-1])
    assert result["state"] == "completed"
    look(run, seen)
    assert {"step-00000018"} == seen["final"]
    assert (run.exports / "latest").resolve() == run.export(18)
    assert (run.exports / "best").resolve() == run.export(result["best_step"])
    assert seen["latest"]
    exported = {row["step"] for row in read_rows(run.ledger) if row["event"] == "exported"}
    failed = [row for row in read_rows(run.ledger) if row["event"] == "export_failed"]
    assert {6, 12, 18} <= exported | {row["step"] for row in failed}
    assert [path.name for path in run.exports.iterdir() if path.name.startswith(".")] == []
    assert "completed at step 18 of 18" in run.report.read_text()
    assert "attempt 2 on 2 workers" in run.story.read_text()
