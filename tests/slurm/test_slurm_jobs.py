"""Runs as jobs of a real Slurm with two nodes: to the end, back into the queue and on, stopped."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from typing import Any

import pytest

from dist_ft.checkpoint.lineage import committed
from dist_ft.layout import RunDir
from dist_ft.storage.publish import read_json
from dist_ft.storage.store import LocalStore
from tests.helpers.paths import ROOT
from tests.helpers.rows import last_rows
from tests.helpers.runs import CONFIG
from tests.slurm.conftest import Slurm

TEMPLATE = ROOT / "cluster" / "slurm" / "job.sbatch"
STEPS = 60

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


def submission(slurm: Slurm, name: str, *more: str) -> list[str]:
    return [
        "dist-ft", "submit", str(CONFIG), f"run.name={name}", f"run.output_dir={slurm.shared_dir}", "data.eval=null",
        "monitor.wandb=disabled", f"train.max_steps={STEPS}", "checkpoint.every_steps=20", "optimizer.lr=1e-3",
        "--to", "slurm", "--template", str(TEMPLATE), "--sbatch=--cpus-per-task=1",
        f"--sbatch=--output={slurm.shared_dir}/{name}.log", *more,
    ]  # fmt: skip


def until(condition: Callable[[], Any], slurm: Slurm, limit_s: float = 200) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, slurm.logs()
        time.sleep(0.2)


def at_step(run_dir: RunDir, step: int) -> bool:
    return run_dir.run_json.exists() and read_json(run_dir.run_json)["step"] >= step


def result(run_dir: RunDir) -> tuple[Any, ...]:
    rows = sorted(last_rows(run_dir.metrics).items())
    return [file.xxh3 for file in committed(LocalStore(run_dir.path))[-1].files], [
        (step, row["digest"], row["loss"]) for step, row in rows
    ]


@pytest.fixture(scope="module")
def undisturbed(slurm: Slurm) -> RunDir:
    code, out, err = slurm.run(*submission(slurm, "whole", "--follow"))
    assert code == 0, out + err + slurm.logs()
    assert "checks failed" not in out and "all-reduce" in out and "over 2 nodes" in out
    return RunDir(slurm.shared_dir / "whole")


def test_a_job_trains_on_two_nodes_to_the_end(slurm: Slurm, undisturbed: RunDir) -> None:
    record = read_json(undisturbed.run_json)
    assert (record["state"], record["step"]) == ("completed", STEPS)
    assert record["world_size"] == 2, "each node has a slot: they are on both"
    assert (undisturbed.exports / "final" / "model.safetensors").exists()


def test_a_job_whose_time_is_over_is_requeued_and_goes_on(slurm: Slurm, undisturbed: RunDir) -> None:
    code, out, err = slurm.run(*submission(slurm, "parts"))
    assert code == 0, err
    job = re.findall(r"submitted slurm:(\d+)", out)[0]
    parts = RunDir(slurm.shared_dir / "parts")
    until(lambda: at_step(parts, 3), slurm)
    code, _, err = slurm.run(*submission(slurm, "parts", "--resume"))
    assert code == 2 and f"slurm:{job}" in err, "a run that is at work is refused, and its job is named"
    slurm.run("scancel", "--batch", "--signal=USR1", job)  # as Slurm does before the time is over
    code, out, err = slurm.run("dist-ft", "logs", f"slurm:{job}", "--follow")
    assert code == 0, out + err + slurm.logs()
    record = read_json(parts.run_json)
    assert (record["state"], record["attempt"]) == ("completed", 2)
    assert json.loads(slurm.run("dist-ft", "status", f"slurm:{job}", "--json")[1])["restarts"] == 1
    assert result(parts) == result(undisturbed)


def test_a_stopped_job_ends_with_a_checkpoint_and_its_exit_code(slurm: Slurm) -> None:
    out = slurm.run(*submission(slurm, "stopped", "train.max_steps=5000"))[1]
    job = re.findall(r"submitted (slurm:\d+)", out)[0]
    run_dir = RunDir(slurm.shared_dir / "stopped")
    until(lambda: at_step(run_dir, 3), slurm)
    code, out, err = slurm.run("dist-ft", "stop", job)
    assert code == 0, err
    assert "exit code 3" in out
    assert [manifest.step for manifest in committed(LocalStore(run_dir.path))][-1] == read_json(run_dir.run_json)[
        "step"
    ]
    assert not list((slurm.shared_dir / "stopped").rglob(".dist-ft-doctor*"))


def test_what_a_preflight_finds_is_the_exit_code_of_the_job(slurm: Slurm) -> None:
    code, out, _ = slurm.run(*submission(slurm, "keyless", "monitor.wandb=online", "--follow"))
    assert code == 1
    assert "FAIL  W&B" in out


def test_more_workers_than_the_job_can_hold_are_refused_at_once(slurm: Slurm) -> None:
    code, _, err = slurm.run(*submission(slurm, "small", "cluster.num_workers=7"))
    assert code == 2
    assert "cluster.num_workers=7: the job has 2 nodes of 1 workers" in err
