"""What is said of a RayJob that was submitted, and how it is stopped."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from dist_ft.errors import DistFtError, UsageError
from dist_ft.launchers.kubernetes.job import follow, logs, read_job, render_job, stop
from dist_ft.layout import RunDir, write_json
from dist_ft.run.state import RunRecord
from tests.helpers.fake_kubectl import FakeKubectl

JOB = "kubernetes:team/try-1"
LOOK = ["get", "rayjob", "try-1", "-n", "team"]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeKubectl:
    folder = tmp_path / "bin"
    folder.mkdir()
    return FakeKubectl(folder, monkeypatch)


def answer(state: str, run_dir: str = "/mnt/r", mode: str = "K8sJobMode", **status: Any) -> tuple[list[str], Any, int]:
    metadata = {"name": "try-1", "annotations": {"dist-ft/run-dir": run_dir}}
    status |= {"jobDeploymentStatus": state, "rayClusterName": "try-1-raycluster-x"}
    return (LOOK, {"metadata": metadata, "spec": {"submissionMode": mode}, "status": status}, 0)


def test_the_operators_word_and_the_run_directory_are_said(fake: FakeKubectl) -> None:
    fake.answer([answer("Running")])
    job = read_job(JOB)
    assert (job["job_state"], job["exit_code"], job["run_dir"], job["run"]) == ("Running", None, "/mnt/r", None)
    assert render_job(job) == f"{JOB}: Running\n  run directory /mnt/r, not visible from here (or not there yet)"


def test_one_that_has_ended_has_the_runs_own_exit_code_and_state(fake: FakeKubectl, tmp_path: Path) -> None:
    write_json(RunDir(tmp_path).run_json, asdict(RunRecord("a", state="failed", attempt=1, step=17, max_steps=40)))
    fake.answer([answer("Failed", str(tmp_path), message="failed with exit code 1, last")])
    job = json.loads(json.dumps(read_job(JOB)))
    assert (job["exit_code"], job["run"]["step"]) == (1, 17)
    assert "exit code 1" in render_job(job)


@pytest.mark.parametrize(
    ("mode", "asked"),
    [("K8sJobMode", "job/try-1"), ("SidecarMode", "ray.io/cluster=try-1-raycluster-x,ray.io/node-type=head")],
)
def test_the_output_is_the_submitters(fake: FakeKubectl, mode: str, asked: str) -> None:
    fake.answer([answer("Running", mode=mode), (["logs"], "loss 2.0\n", 0)])
    assert logs(JOB) == "loss 2.0\n"
    assert asked in fake.calls[-1]


def test_following_ends_with_the_runs_exit_code(fake: FakeKubectl) -> None:
    fake.answer([answer("Complete", jobStatus="STOPPED")] * 2)
    assert follow(JOB) == 3


def test_a_stop_deletes_it_and_waits_for_its_pods(fake: FakeKubectl) -> None:
    fake.answer([answer("Running")])
    assert JOB in stop(JOB, 60)
    deletion = fake.calls[-1]
    assert deletion[:5] == ["delete", "rayjob", "try-1", "-n", "team"]
    assert {"--cascade=foreground", "--wait", "--timeout=60s"} <= set(deletion)


def test_what_has_ended_is_not_stopped(fake: FakeKubectl) -> None:
    fake.answer([answer("Complete")])
    with pytest.raises(UsageError, match="nothing to stop"):
        stop(JOB, 60)
    assert len(fake.calls) == 1


@pytest.mark.parametrize("job", [f"kubernetes:{rest}" for rest in ("try-1", "/x", "a/", "a/b/c", "a/-A", "-A/a")])
def test_what_is_no_name_never_reaches_kubectl(fake: FakeKubectl, job: str) -> None:
    with pytest.raises(UsageError, match="such as kubernetes:dist-ft/"):
        read_job(job)


def test_one_that_is_not_there_and_a_cluster_that_is_not(fake: FakeKubectl) -> None:
    fake.answer([(LOOK, 'Error from server (NotFound): rayjobs.ray.io "try-1" not found', 1)])
    with pytest.raises(UsageError, match="no such RayJob"):
        read_job(JOB)
    fake.answer([(LOOK, "connection refused", 1)])
    with pytest.raises(DistFtError, match="connection refused"):
        read_job(JOB)
