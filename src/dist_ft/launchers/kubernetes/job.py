"""Submits runs to Kubernetes as RayJobs of KubeRay, and looks after them. Talks to a cluster through `kubectl` only.

A job is called `kubernetes:NAMESPACE/NAME`. It needs the rights of whoever submits (cluster/kuberay/common). These do
not include `exec`, so a run directory is read only where this machine sees it.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from dist_ft.errors import DistFtError, UsageError
from dist_ft.launchers.kubernetes.kubectl import KUBECTL_LIMIT_S, kubectl
from dist_ft.launchers.kubernetes.manifests import RUN_DIR, RUN_LABEL
from dist_ft.launchers.kubernetes.object_types import Manifest
from dist_ft.launchers.kubernetes.submit import NAMESPACE, render
from dist_ft.launchers.launcher import Ended, Job, RunAtWorkError, SubmitRequest, Submitted

PREFIX = "kubernetes:"
_FINAL = frozenset({"Complete", "Failed", "ValidationFailed"})
_STOPPED_EXIT_CODE = 3
_APPLY = ("apply", "--server-side", "--field-manager=dist-ft", "-f", "-")


@dataclass(frozen=True)
class RayJob:
    """What the API server says of a RayJob.

    Attributes:
        name: Its name.
        run_dir: Path of the run in its pods, or URL.
        state: `jobDeploymentStatus` of the operator; empty until it has seen the object.
        job_status: Ray's own word for the job.
        job_id: Of Ray; another one for each try.
        message: The operator's.
        output: Arguments of `kubectl logs` for the submitter: a pod of its own, or a container of the head.
    """

    name: str
    run_dir: str | None
    state: str
    job_status: str | None
    job_id: str | None
    message: str
    output: tuple[str, ...]

    @classmethod
    def from_manifest(cls, manifest: Manifest) -> RayJob:
        """Read the object that `kubectl get -o json` prints."""
        metadata, status = manifest["metadata"], manifest.get("status", {})
        output: tuple[str, ...] = (f"job/{metadata['name']}",)
        if manifest["spec"].get("submissionMode") == "SidecarMode":
            selector = f"ray.io/cluster={status.get('rayClusterName', '')},ray.io/node-type=head"
            output = ("-l", selector, "-c", "ray-job-submitter", "--tail=-1")
        return cls(
            metadata["name"],
            (metadata.get("annotations") or {}).get(RUN_DIR),
            status.get("jobDeploymentStatus") or "",
            status.get("jobStatus"),
            status.get("jobId"),
            status.get("message") or "",
            output,
        )

    @property
    def is_over(self) -> bool:
        """Whether it has ended and the operator will not start it again."""
        return self.state in _FINAL

    @property
    def exit_code(self) -> int | None:
        """The run's exit code, once the job is over. Kubernetes keeps it only in a message."""
        if not self.is_over:
            return None
        if self.state == "ValidationFailed":
            return UsageError.exit_code
        if self.job_status in ("SUCCEEDED", "STOPPED"):
            return 0 if self.job_status == "SUCCEEDED" else _STOPPED_EXIT_CODE
        found = re.search(r"failed with exit code (\d+)", self.message)
        return int(found[1]) if found else DistFtError.exit_code


class KubernetesLauncher:
    """Starts runs as RayJobs on the cluster of the current kubectl context.

    Args:
        overlay: Kustomization directory such as `cluster/kuberay/overlays/gpu`; only `submit` needs one.
        namespace: Where runs are submitted.
        image: Replaces the overlay's image.
        poll_s: Seconds between two requests while following.
    """

    def __init__(
        self, overlay: Path | None = None, namespace: str = NAMESPACE, image: str | None = None, poll_s: float = 2.0
    ) -> None:
        self._overlay = overlay
        self._namespace = namespace
        self._image = image
        self._poll_s = poll_s

    def submit(self, request: SubmitRequest) -> Submitted:
        """Apply the objects of a run, after a dry run of the API server; see `Launcher`.

        A run that was submitted before goes on from its last checkpoint, if `request.resume` says so; one that is
        still there is never started twice.
        """
        if self._overlay is None:
            raise UsageError("--to kubernetes needs --overlay DIR, such as cluster/kuberay/overlays/gpu")
        namespace = self._namespace
        suffix = uuid.uuid4().hex[:5]
        run = render(request, self._overlay, suffix=suffix, namespace=namespace, image=self._image)
        found = kubectl("get", "rayjobs", "-n", namespace, "-l", f"{RUN_LABEL}={run.run_label}", "-o", "json")
        earlier = [RayJob.from_manifest(item) for item in json.loads(found)["items"]]
        if live := [job.name for job in earlier if not job.is_over]:
            raise RunAtWorkError(
                f"the run is at work as RayJob {live[0]} in namespace {namespace}; follow it, stop it first, or choose "
                "another run.name",
                f"{PREFIX}{namespace}/{live[0]}",
            )
        if earlier and not request.resume:
            raise UsageError(
                f"the run was submitted before as RayJob {earlier[-1].name} in namespace {namespace}; go on "
                "with --resume, or choose another run.name"
            )
        text = json.dumps({"apiVersion": "v1", "kind": "List", "items": run.manifests})
        kubectl(*_APPLY, "--dry-run=server", stdin=text)
        kubectl(*_APPLY, stdin=text)
        return Submitted(f"{PREFIX}{namespace}/{run.name}", run.run_dir)

    def status(self, job: str) -> Job:
        """Return what the operator says of a job."""
        found = _get(job)
        state = found.state or "waiting for the operator"
        return Job(job, state, found.is_over, found.exit_code, found.message or None, found.run_dir)

    def logs(self, job: str) -> str:
        """Return the output so far. Raises DistFtError if the pods are not there yet, or are gone."""
        return kubectl("logs", *_get(job).output, "-n", _parts(job)[0])

    def follow(self, job: str) -> Ended:
        """Print the output of all tries until the job ends; see `Launcher`."""
        namespace, name = _parts(job)
        found = _get(job)
        said, shown = None, None
        while True:
            if found.is_over:
                print(f"{name}: {found.state} {found.message}".rstrip(), flush=True)
                return Ended(found.exit_code or 0)
            if found.state != said:
                print(f"{name}: {found.state or 'waiting for the operator'}", flush=True)
                said = found.state
            # Each try has a job id of its own; its submitter may not be there yet.
            if found.state == "Running" and shown != found.job_id and _show_output(found, namespace):
                shown = found.job_id
            time.sleep(self._poll_s)
            try:
                found = _get(job)
            except UsageError:
                return Ended(1, reason=f"{job} was deleted; if it was stopped, submit the run with --resume to go on")

    def stop(self, job: str, timeout_s: float) -> str:
        """Stop a run after a checkpoint, and wait until its pods are gone; see `Launcher`.

        Deletes the RayJob: the operator stops the job, and the head's preStop hook waits for the checkpoint. A
        `dist-ft stop` in a pod would count as a failed try, which the operator repeats up to `backoffLimit`.
        """
        found = _get(job)
        if found.is_over:
            raise UsageError(f"{job} is not running: it is {found.state}; there is nothing to stop")
        namespace, name = _parts(job)
        wait = ("--cascade=foreground", "--wait", f"--timeout={timeout_s:.0f}s")
        kubectl("delete", "rayjob", name, "-n", namespace, *wait, limit_s=timeout_s + KUBECTL_LIMIT_S)
        return f"stopped {job}; submit the run with --resume to go on"


def _show_output(job: RayJob, namespace: str) -> bool:
    """Streams the submitter's output until the job ends or the submitter is lost; returns whether there was one."""
    command = ["kubectl", "logs", "--follow", "--pod-running-timeout=60s", "-n", namespace, *job.output]
    return subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0


def _get(job: str) -> RayJob:
    namespace, name = _parts(job)
    try:
        return RayJob.from_manifest(json.loads(kubectl("get", "rayjob", name, "-n", namespace, "-o", "json")))
    except DistFtError as error:
        if "NotFound" not in str(error):
            raise
        raise UsageError(f"{job}: no such RayJob (one that has ended is deleted after ten minutes)") from error


def _parts(job: str) -> tuple[str, str]:
    """Return namespace and name. Refuse a leading `-`, which kubectl would take for an option."""
    namespace, slash, name = job.removeprefix(PREFIX).partition("/")
    if not slash or not namespace or not name or "/" in name or name.startswith("-") or namespace.startswith("-"):
        raise UsageError(f"{job} is not the name of a RayJob, such as {PREFIX}dist-ft/my-run-a1b2c")
    return namespace, name
