"""What a Ray job is given, what is said of it, and how it is stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.job_submission import JobDetails, JobStatus, JobType

from dist_ft.errors import DistFtError, UsageError
from dist_ft.launchers.launcher import STOP_ENV, SubmitRequest
from dist_ft.launchers.ray import jobs
from dist_ft.launchers.ray.jobs import RayLauncher


class Server:
    """A server with one job, which goes through the given states."""

    def __init__(self, *states: str, run_dir: Path = Path("/nowhere/a"), log: str = "") -> None:
        self._states = list(states)
        self._metadata = {"run_id": "a", "run_dir": str(run_dir)}
        self._log = log

    def info(self, submission_id: str) -> JobDetails:
        state = self._states.pop(0) if len(self._states) > 1 else self._states[0]
        return JobDetails(
            type=JobType.SUBMISSION, status=JobStatus(state), entrypoint="", metadata=self._metadata, message="m"
        )

    def stop(self, submission_id: str) -> None:
        pass

    def logs(self, submission_id: str) -> str:
        return self._log


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> Callable[..., RayLauncher]:
    def make(*states: str, **more: Any) -> RayLauncher:
        monkeypatch.setattr(jobs, "JobServer", lambda address: Server(*states, **more))
        return RayLauncher()

    return make


given: list[tuple[str, dict[str, Any], dict[str, str]]] = []


class EmptyServer:
    """A server without jobs, which keeps what it is given."""

    warnings: tuple[str, ...] = ()

    def __init__(self, address: str | None) -> None:
        self.address = address or ""

    def jobs(self) -> list[JobDetails]:
        return []

    def submit(self, submission_id: str, entrypoint: str, runtime_env: dict[str, Any], **job: Any) -> None:
        text = (Path(runtime_env["working_dir"]) / "config.yaml").read_text()
        given.append((entrypoint, yaml.safe_load(text), runtime_env["env_vars"]))


def test_a_job_gets_the_keys_that_were_set_and_a_stop_that_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "JobServer", EmptyServer)
    path = tmp_path / "mine.yaml"
    path.write_text("model: {name: tiny-random}\ndata: {train: [{source: /d/a.jsonl}]}\nmethod: {init_from: /d/a}\n")
    submitted = RayLauncher("http://h:8265").submit(SubmitRequest(path, ("run.output_dir=/d/runs",)))
    assert (submitted.run_dir, submitted.address) == ("/d/runs/mine", "http://h:8265")
    [(entrypoint, config, env)] = given
    assert entrypoint == "exec dist-ft train config.yaml --json --preflight"
    assert config == {
        "run": {"name": "mine", "output_dir": "/d/runs"},
        "model": {"name": "tiny-random"},
        "method": {"init_from": "/d/a"},
        "data": {"train": [{"source": "/d/a.jsonl"}]},
        "cluster": {"address": "auto"},
    }
    assert env == STOP_ENV


@pytest.mark.parametrize(("state", "is_over"), [("RUNNING", False), ("FAILED", True)])
def test_a_job_names_its_run(launcher: Callable[..., RayLauncher], state: str, is_over: bool) -> None:
    job = launcher(state).status("a-1")
    assert (job.job_state, job.is_over, job.run_id, job.run_dir) == (state, is_over, "a", "/nowhere/a")
    assert job.describe() == f"a-1: {state}: m"


def result(state: str) -> str:
    return "a line\n" + json.dumps({"run_dir": "/nowhere/a", "state": state, "steps": 4}) + "\n"


def test_a_stop_says_where_the_run_stands(launcher: Callable[..., RayLauncher]) -> None:
    assert launcher("RUNNING", "STOPPED", log=result("stopped")).stop("a-1", 10) == "stopped at step 4: /nowhere/a"


@pytest.mark.parametrize(("log", "words"), [("", "before it had a result"), (result("failed"), "failed at step 4")])
def test_a_stop_without_a_checkpoint_is_a_failure(launcher: Callable[..., RayLauncher], log: str, words: str) -> None:
    with pytest.raises(DistFtError, match=words):
        launcher("RUNNING", "STOPPED", log=log).stop("a-1", 10)


def test_a_stop_has_a_limit(launcher: Callable[..., RayLauncher]) -> None:
    with pytest.raises(DistFtError, match="still RUNNING after 0 s"):
        launcher("RUNNING").stop("a-1", 0)


def test_a_job_that_has_ended_is_not_stopped(launcher: Callable[..., RayLauncher]) -> None:
    with pytest.raises(UsageError, match="SUCCEEDED; there is nothing to stop"):
        launcher("SUCCEEDED").stop("a-1", 10)
