"""`dist-ft doctor --cluster` on a real Ray: a good one, one that does not suit a config, one with a node that hangs."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.cluster import LoopbackCluster
from tests.helpers.runs import CONFIG


def doctor(cli: str, address: str, *arguments: str) -> tuple[int, dict[str, dict[str, Any]]]:
    done = subprocess.run(
        [cli, "doctor", *arguments, "--cluster", address, "--json"], capture_output=True, text=True, timeout=240
    )
    assert done.stdout, done.stderr
    return done.returncode, {check["name"]: check for check in json.loads(done.stdout)}


def test_a_good_cluster_passes_and_nothing_is_left_in_it(cli: str, ray_address: str, tmp_path: Path) -> None:
    code, checks = doctor(cli, ray_address, str(CONFIG), f"run.output_dir={tmp_path / 'runs'}")
    assert code == 0, checks
    subjects = {"versions", "devices", "shared memory", "temp directory", "interfaces", "names", "network",
                "output directory", "shared files", "disk", "clocks", "all-reduce", "W&B", "workers"}  # fmt: skip
    assert subjects <= set(checks)
    assert "gloo works" in checks["all-reduce"]["detail"]
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_suit_the_config_fails_with_a_remedy(cli: str, ray_address: str) -> None:
    overrides = ["run.output_dir=/proc/nowhere", "cluster.num_workers=99", "monitor.wandb=online"]
    code, checks = doctor(cli, ray_address, str(CONFIG), *overrides)
    assert code == 1
    bad = {name for name, check in checks.items() if not check["is_ok"]}
    assert bad == {"workers", "output directory", "disk", "W&B"}
    assert all(checks[name]["hint"] for name in bad)


def test_a_run_that_begins_with_a_look_ends_there_when_something_is_wrong(
    cli: str, ray_address: str, tmp_path: Path
) -> None:
    overrides = [f"run.output_dir={tmp_path / 'runs'}", "monitor.wandb=online"]
    done = subprocess.run(
        [cli, "train", str(CONFIG), *overrides, "--address", ray_address, "--preflight"],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 1
    assert "FAIL  W&B" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_node_that_hangs_is_named_and_the_others_are_judged(
    cli: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    cluster = LoopbackCluster()
    try:
        node = cluster.add()
        os.kill(node.raylet, signal.SIGSTOP)
        code, checks = doctor(cli, cluster.address, str(CONFIG), f"run.output_dir={tmp_path / 'runs'}")
        os.kill(node.raylet, signal.SIGCONT)
    finally:
        cluster.close()
    assert code == 1
    assert f"/{node.node_id[:6]}: no answer" in checks["versions"]["detail"]
    assert "gloo works; one node" in checks["all-reduce"]["detail"]
    assert list(tmp_path.iterdir()) == []
