"""What is said of a job, with and without a look at its run directory."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from ray.job_submission import JobDetails, JobStatus, JobType

from dist_ft.errors import DistFtError, UsageError
from dist_ft.launchers.launcher import STOP_ENV, SubmitRequest
from dist_ft.launchers.ray import jobs
from dist_ft.launchers.ray.jobs import read_job, render_job, stop, submit
from dist_ft.launchers.ray.server import JobServer
from dist_ft.layout import RunDir, write_json
from dist_ft.run.state import RunRecord


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


def server(*states: str, **more: Any) -> JobServer:
    return cast(JobServer, Server(*states, **more))


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
    submit(SubmitRequest(path, ("run.output_dir=/d/runs",)), "http://h:8265")
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


def test_a_run_directory_that_is_visible_is_read(tmp_path: Path) -> None:
    record = RunRecord("a", state="running", attempt=1, step=17, max_steps=40, world_size=2)
    write_json(RunDir(tmp_path).run_json, asdict(record))
    job = read_job(server("RUNNING", run_dir=tmp_path), "a-1")
    assert (job["job_state"], job["run"]["step"]) == ("RUNNING", 17)
    assert "a-1: job RUNNING" in render_job(job)
    assert "17 of 40" in render_job(job)


def test_one_that_is_elsewhere_is_named() -> None:
    job = read_job(server("FAILED"), "a-1")
    assert job["run"] is None
    assert "/nowhere/a, not visible from here" in render_job(job)


def result(state: str) -> str:
    return "a line\n" + json.dumps({"run_dir": "/nowhere/a", "state": state, "steps": 4}) + "\n"


def test_a_stop_says_where_the_run_stands() -> None:
    assert stop(server("RUNNING", "STOPPED", log=result("stopped")), "a-1", 10) == "stopped at step 4: /nowhere/a"


@pytest.mark.parametrize(("log", "words"), [("", "before it had a result"), (result("failed"), "failed at step 4")])
def test_a_stop_without_a_checkpoint_is_a_failure(log: str, words: str) -> None:
    with pytest.raises(DistFtError, match=words):
        stop(server("RUNNING", "STOPPED", log=log), "a-1", 10)


def test_a_stop_has_a_limit() -> None:
    with pytest.raises(DistFtError, match="still RUNNING after 0 s"):
        stop(server("RUNNING"), "a-1", 0)


def test_a_job_that_has_ended_is_not_stopped() -> None:
    with pytest.raises(UsageError, match="SUCCEEDED; there is nothing to stop"):
        stop(server("SUCCEEDED"), "a-1", 10)
