"""Places where launchers start runs, each with one run that ends as it is told to: for the launchers' contract.

The local machine is real, with a script in place of `dist-ft train`. Ray's job server, Slurm and the API server of
Kubernetes are doubles that keep jobs: what the real ones answer is checked elsewhere (`tests/integration`,
`tests/slurm`, `tests/k8s`).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
from ray.job_submission import JobDetails, JobStatus, JobType

from dist_ft.errors import DistFtError, UsageError
from dist_ft.launchers import slurm
from dist_ft.launchers.kubernetes import job as kubernetes_job
from dist_ft.launchers.kubernetes import submit as kubernetes_submit
from dist_ft.launchers.kubernetes.job import KubernetesLauncher
from dist_ft.launchers.local import LocalLauncher
from dist_ft.launchers.ray import jobs as ray_jobs
from dist_ft.launchers.ray.jobs import RayLauncher
from dist_ft.launchers.slurm import SlurmLauncher
from dist_ft.run.outcome import RunResult
from tests.helpers.paths import ROOT
from tests.k8s import overlays

WORDS = "step 1, loss 2.0"
"""What the run has written as soon as it is at work."""


_TRAIN = """
import json, os, signal, sys, time
from pathlib import Path
orders = Path({orders!r})
with (orders / "started").open("a") as file:
    file.write(f"{{os.getpid()}}\\n")
def result(state):
    print(json.dumps({{"run_dir": "/runs/a", "state": state, "steps": 4}}), flush=True)
def on_stop(number, frame):
    result("stopped")
    sys.exit(3)
signal.signal(signal.SIGINT, signal.SIG_IGN if (orders / "deaf").exists() else on_stop)
print({words!r}, flush=True)
while not (orders / "end").exists():
    time.sleep(0.01)
code = int((orders / "end").read_text())
if code == 0:
    result("completed")
if code == 3:
    result("stopped")
sys.exit(code)
"""


class LocalPlace:
    """This machine; the run is a script."""

    unknown = "local:nobody"

    def __init__(self, folder: Path) -> None:
        self.orders = folder / "orders"
        self.orders.mkdir()
        script = folder / "train.py"
        script.write_text(_TRAIN.format(orders=str(self.orders), words=WORDS))
        self.launcher = LocalLauncher(folder / "jobs", [sys.executable, str(script)], poll_s=0.01)

    def end(self, code: int) -> None:
        temporary = self.orders / "end.tmp"
        temporary.write_text(str(code))
        temporary.replace(self.orders / "end")

    def end_after_output(self, code: int) -> None:
        threading.Timer(0.1, self.end, [code]).start()  # sooner or later is the same

    def be_deaf(self) -> None:
        (self.orders / "deaf").touch()

    @property
    def pids(self) -> list[int]:
        """Processes of the runs, in the order of their start."""
        started = self.orders / "started"
        return [int(line) for line in started.read_text().split()] if started.exists() else []

    @property
    def num_started(self) -> int:
        return len(self.pids)

    def close(self) -> None:
        """Ends what is left."""
        for pid in self.pids:
            if str(self.orders.parent) in _command_line(pid):
                os.kill(pid, signal.SIGKILL)


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def _result(state: str) -> str:
    return json.dumps(asdict(RunResult("/runs/a", state, 4))) + "\n"


@dataclass
class Started:
    """A run that a double has taken."""

    name: str
    run_dir: str
    code: int | None = None
    was_stopped: bool = False

    @property
    def log(self) -> str:
        return f"{WORDS}\n" + {0: _result("completed"), 3: _result("stopped")}.get(self.code or 0, "") * (
            self.code is not None
        )


class _Double:
    """A place that keeps its runs in memory.

    Attributes:
        runs: In the order of their start.
        is_deaf: Whether a stop is heard, but not followed.
    """

    unknown = ""

    def __init__(self) -> None:
        self.runs: list[Started] = []
        self.is_deaf = False

    def end(self, code: int) -> None:
        self.runs[-1].code = code

    def end_after_output(self, code: int) -> None:
        self.end(code)

    def be_deaf(self) -> None:
        self.is_deaf = True

    def stop_run(self, run: Started) -> None:
        if not self.is_deaf:
            run.code, run.was_stopped = 3, True

    @property
    def num_started(self) -> int:
        return len(self.runs)

    def find(self, name: str) -> Started | None:
        return next((run for run in self.runs if run.name == name), None)

    def close(self) -> None:
        pass


class RayPlace(_Double):
    """A job server of Ray."""

    unknown = "nobody-20261126"

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        monkeypatch.setattr(ray_jobs, "JobServer", lambda address: self)
        self.address = "http://127.0.0.1:8265"
        self.warnings: list[str] = []
        self.launcher = RayLauncher()

    def submit(self, submission_id: str, metadata: dict[str, str], **more: Any) -> None:
        self.runs.append(Started(submission_id, metadata["run_dir"]))

    def info(self, submission_id: str) -> JobDetails:
        if (run := self.find(submission_id)) is None:
            raise UsageError(f"{submission_id} is neither a run directory here nor a job of the cluster")
        status = JobStatus.RUNNING
        if run.code is not None:
            status = JobStatus.STOPPED if run.was_stopped else JobStatus.FAILED if run.code else JobStatus.SUCCEEDED
        return JobDetails(
            type=JobType.SUBMISSION, status=status, entrypoint="", submission_id=submission_id, message="said",
            metadata={"run_dir": run.run_dir, "run_id": "mine"}, driver_exit_code=None if run.was_stopped else run.code,
        )  # fmt: skip

    def jobs(self) -> list[JobDetails]:
        return [self.info(run.name) for run in self.runs]

    def stop(self, submission_id: str) -> None:
        if (run := self.find(submission_id)) is not None:
            self.stop_run(run)

    def logs(self, submission_id: str) -> str:
        self.info(submission_id)
        return next(run.log for run in self.runs if run.name == submission_id)

    async def tail(self, submission_id: str) -> AsyncIterator[str]:
        yield self.logs(submission_id)


class SlurmPlace(_Double):
    """Slurm's commands."""

    unknown = "slurm:99"

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self._folder = folder
        monkeypatch.setattr(slurm, "_slurm", self)
        self.launcher = SlurmLauncher(ROOT / "cluster" / "slurm" / "job.sbatch", poll_s=0)

    def __call__(self, command: str, *words: str, stdin: str | None = None) -> str:
        if command == "sbatch":
            number = str(17 + len(self.runs))
            comment = next(word.partition("=")[2] for word in words if word.startswith("--comment="))
            self.runs.append(Started(number, comment))
            return f"{number}\n"
        if command == "squeue":
            return "".join(f"{run.name} {run.run_dir}\n" for run in self.runs if run.code is None)
        if (run := self.find(words[-1])) is None:
            raise DistFtError("scontrol failed: slurm_load_jobs error: Invalid job id specified")
        if command == "scancel":
            self.stop_run(run)
            return ""
        (self._folder / "slurm.out").write_text(run.log)
        state = "RUNNING" if run.code is None else "FAILED" if run.code else "COMPLETED"
        return (f"JobId={run.name}\n   JobState={state} Reason=None\n   Restarts=0 ExitCode={run.code or 0}:0\n"
                f"   StdOut={self._folder}/slurm.out\n   Comment={run.run_dir}\n")  # fmt: skip


class KubernetesPlace(_Double):
    """kubectl before an API server with an operator."""

    unknown = "kubernetes:dist-ft/nobody-1"

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self._code_after_output: int | None = None
        for module in (kubernetes_job, kubernetes_submit):
            monkeypatch.setattr(module, "kubectl", self)
        monkeypatch.setattr(kubernetes_job, "_show_output", self._show_output)
        overlay = overlays.KUBERAY / "overlays" / "smoke-cpu"
        self.launcher = KubernetesLauncher(overlay, image="here/dist-ft:1", poll_s=0)

    def __call__(self, verb: str, *words: str, stdin: str | None = None, limit_s: float = 0) -> str:
        if verb == "kustomize":
            return overlays.text("smoke-cpu")
        if verb == "apply":
            assert stdin is not None
            if "--dry-run=server" not in words:
                job = next(item for item in json.loads(stdin)["items"] if item["kind"] == "RayJob")
                self.runs.append(Started(job["metadata"]["name"], job["metadata"]["annotations"]["dist-ft/run-dir"]))
            return ""
        if words[0] == "rayjobs":
            return json.dumps({"items": [self._object(run) for run in self.runs]})
        name = words[0].removeprefix("job/") if verb == "logs" else words[1]
        if (run := self.find(name)) is None:
            raise DistFtError("kubectl get failed: Error from server (NotFound)")
        if verb == "logs":
            return run.log
        if verb == "delete":
            if self.is_deaf:
                raise DistFtError("kubectl delete did not end within its limit; is the cluster there?")
            self.stop_run(run)
            return ""
        return json.dumps(self._object(run))

    def _object(self, run: Started) -> dict[str, Any]:
        status: dict[str, Any] = {"jobDeploymentStatus": "Running", "jobId": "a"}
        if run.code == 0:
            status |= {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}
        elif run.code == 3 and run.was_stopped:
            status |= {"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}
        elif run.code is not None:
            message = f"Job entrypoint command failed with exit code {run.code}, last available logs"
            status |= {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "message": message}
        metadata = {"name": run.name, "annotations": {"dist-ft/run-dir": run.run_dir}}
        return {"metadata": metadata, "spec": {}, "status": status}

    def end_after_output(self, code: int) -> None:
        self._code_after_output = code

    def _show_output(self, job: kubernetes_job.RayJob, namespace: str) -> bool:
        print(WORDS)
        if self._code_after_output is not None:
            self.end(self._code_after_output)
        return True


def wait_until_started(place: LocalPlace, count: int = 1) -> None:
    """Waits until that many runs of this machine have reported themselves."""
    while place.num_started < count:
        time.sleep(0.01)
