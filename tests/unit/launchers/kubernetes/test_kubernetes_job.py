"""What is said of a RayJob that was submitted, and how it is stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dist_ft.errors import DistFtError, UsageError
from dist_ft.launchers.kubernetes.job import KubernetesLauncher, RayJob
from tests.helpers.fake_kubectl import FakeKubectl

JOB = "kubernetes:team/try-1"
LAUNCHER = KubernetesLauncher(poll_s=0)
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


def test_the_operators_word_and_the_run_directory_are_known(fake: FakeKubectl) -> None:
    fake.answer([answer("Running")])
    job = LAUNCHER.status(JOB)
    assert (job.job_state, job.is_over, job.exit_code, job.run_dir) == ("Running", False, None, "/mnt/r")
    assert job.describe() == f"{JOB}: Running"


def test_one_that_has_ended_has_the_runs_own_exit_code(fake: FakeKubectl) -> None:
    fake.answer([answer("Failed", message="failed with exit code 1, last")])
    job = LAUNCHER.status(JOB)
    assert (job.is_over, job.exit_code) == (True, 1)
    assert job.describe() == f"{JOB}: Failed, exit code 1: failed with exit code 1, last"


@pytest.mark.parametrize(
    ("mode", "asked"),
    [("K8sJobMode", "job/try-1"), ("SidecarMode", "ray.io/cluster=try-1-raycluster-x,ray.io/node-type=head")],
)
def test_the_output_is_the_submitters(fake: FakeKubectl, mode: str, asked: str) -> None:
    fake.answer([answer("Running", mode=mode), (["logs"], "loss 2.0\n", 0)])
    assert LAUNCHER.logs(JOB) == "loss 2.0\n"
    assert asked in fake.calls[-1]


def test_following_ends_with_the_runs_exit_code(fake: FakeKubectl) -> None:
    fake.answer([answer("Complete", jobStatus="STOPPED")] * 2)
    ended = LAUNCHER.follow(JOB)
    assert ended.exit_code == 3


def test_following_lasts_over_retries_and_ends_with_the_runs_own_code(
    fake: FakeKubectl, capfd: pytest.CaptureFixture[str]
) -> None:
    said = "Job entrypoint command failed with exit code 3, last available logs"
    fake.answer([
        answer("Initializing"),
        answer("Running", jobId="a"),
        (["logs"], "the submitter is not there yet", 1),
        answer("Running", jobId="a"),
        (["logs"], "loss 2.0\n", 0),
        answer("Running", jobId="a"),
        answer("Retrying"),
        answer("Running", jobId="b"),
        (["logs"], "loss 1.0\n", 0),
        answer("Failed", jobStatus="FAILED", message=said),
    ])  # fmt: skip
    assert LAUNCHER.follow(JOB).exit_code == 3
    assert [line for line in capfd.readouterr().out.splitlines() if line.startswith("loss")] == ["loss 2.0", "loss 1.0"]


@pytest.mark.parametrize(
    ("status", "code"),
    [
        ({"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}, 0),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, 3),
        ({"jobDeploymentStatus": "ValidationFailed"}, 2),
        ({"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "message": "… failed with exit code 2, last"}, 2),
        ({"jobDeploymentStatus": "Failed", "message": "the head was lost"}, 1),
        ({"jobDeploymentStatus": "Failed"}, 1),
    ],
)
def test_the_status_of_a_rayjob_gives_our_exit_code(status: dict[str, str], code: int) -> None:
    found = RayJob.from_manifest({"metadata": {"name": "try-1"}, "spec": {}, "status": status})
    assert (found.is_over, found.exit_code) == (True, code)


def test_following_a_job_that_somebody_deletes_is_a_failure_with_a_reason(fake: FakeKubectl) -> None:
    fake.answer([answer("Initializing"), (LOOK, 'Error from server (NotFound): rayjobs.ray.io "try-1" not found', 1)])
    ended = LAUNCHER.follow(JOB)
    assert ended.exit_code == 1
    assert ended.reason is not None and "--resume" in ended.reason


def test_a_stop_deletes_it_and_waits_for_its_pods(fake: FakeKubectl) -> None:
    fake.answer([answer("Running")])
    assert JOB in LAUNCHER.stop(JOB, 60)
    deletion = fake.calls[-1]
    assert deletion[:5] == ["delete", "rayjob", "try-1", "-n", "team"]
    assert {"--cascade=foreground", "--wait", "--timeout=60s"} <= set(deletion)


def test_what_has_ended_is_not_stopped(fake: FakeKubectl) -> None:
    fake.answer([answer("Complete")])
    with pytest.raises(UsageError, match="nothing to stop"):
        LAUNCHER.stop(JOB, 60)
    assert len(fake.calls) == 1


@pytest.mark.parametrize("job", [f"kubernetes:{rest}" for rest in ("try-1", "/x", "a/", "a/b/c", "a/-A", "-A/a")])
def test_what_is_no_name_never_reaches_kubectl(fake: FakeKubectl, job: str) -> None:
    with pytest.raises(UsageError, match="such as kubernetes:dist-ft/"):
        LAUNCHER.status(job)


def test_one_that_is_not_there_and_a_cluster_that_is_not(fake: FakeKubectl) -> None:
    fake.answer([(LOOK, 'Error from server (NotFound): rayjobs.ray.io "try-1" not found', 1)])
    with pytest.raises(UsageError, match="no such RayJob"):
        LAUNCHER.status(JOB)
    fake.answer([(LOOK, "connection refused", 1)])
    with pytest.raises(DistFtError, match="connection refused"):
        LAUNCHER.status(JOB)
