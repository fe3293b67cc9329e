"""Looks after a RayJob that was submitted: its state, its output, its end. It is called `kubernetes:NAMESPACE/NAME`.

Needs the rights of whoever submits (cluster/kuberay/common): no exec, so a run directory is read only where it is seen.
"""

from __future__ import annotations

import json
from typing import Any

from dist_ft.errors import DistFtError, UsageError
from dist_ft.launchers.kubernetes import submit
from dist_ft.launchers.kubernetes.manifests import RUN_DIR, Manifest
from dist_ft.launchers.kubernetes.submit import FINAL, KUBECTL_LIMIT_S, PREFIX, exit_code, kubectl, output_of
from dist_ft.run.status import read_if_seen, render_status


def read_job(job: str) -> dict[str, Any]:
    """Returns `{submission_id, job_state, exit_code, message, run_dir, run}`; `exit_code` is None until it has ended.

    Raises:
        UsageError: There is no such RayJob (any more).
    """
    manifest = _get(job)
    status = manifest.get("status", {})
    state = status.get("jobDeploymentStatus") or "waiting for the operator"
    run_dir = (manifest["metadata"].get("annotations") or {}).get(RUN_DIR)
    return {
        "submission_id": job,
        "job_state": state,
        "exit_code": exit_code(status) if state in FINAL else None,
        "message": status.get("message"),
        "run_dir": run_dir,
        "run": read_if_seen(run_dir),
    }


def render_job(job: dict[str, Any]) -> str:
    """Returns what `read_job` found as a few lines of text."""
    code = "" if job["exit_code"] is None else f", exit code {job['exit_code']}"
    message = f": {job['message']}" if job["message"] else ""
    lines = [f"{job['submission_id']}: {job['job_state']}{code}{message}"]
    where = f"  run directory {job['run_dir']}, not visible from here (or not there yet)"
    return "\n".join([*lines, render_status(job["run"]) if job["run"] else where])


def logs(job: str) -> str:
    """Returns what a job has written so far.

    Raises:
        DistFtError: Its pods are not there yet, or are gone.
    """
    return kubectl("logs", *output_of(_get(job)), "-n", _parts(job)[0])


def follow(job: str) -> int:
    """Shows what a job writes until it has ended, over all its retries; returns its exit code."""
    _get(job)
    namespace, name = _parts(job)
    return submit.follow(name, namespace)


def stop(job: str, timeout_s: float) -> str:
    """Has a run checkpoint and stop, and waits until its pods are gone; returns what was stopped.

    Deleting the RayJob does it: the operator stops the job, and the head's preStop waits for the checkpoint. (A stop by
    `dist-ft stop` in a pod alone would count as a failed try, and begin again while `backoffLimit` allows.)

    Raises:
        UsageError: There is no such RayJob, or it has ended already.
        DistFtError: It is not gone in time.
    """
    state = _get(job).get("status", {}).get("jobDeploymentStatus")
    if state in FINAL:
        raise UsageError(f"{job} is not running: it is {state}; there is nothing to stop")
    namespace, name = _parts(job)
    wait = ("--cascade=foreground", "--wait", f"--timeout={timeout_s:.0f}s")
    kubectl("delete", "rayjob", name, "-n", namespace, *wait, limit_s=timeout_s + KUBECTL_LIMIT_S)
    return f"stopped {job}; submit the run with --resume to go on"


def _get(job: str) -> Manifest:
    namespace, name = _parts(job)
    try:
        found: Manifest = json.loads(kubectl("get", "rayjob", name, "-n", namespace, "-o", "json"))
    except DistFtError as error:
        if "NotFound" not in str(error):
            raise
        raise UsageError(f"{job}: no such RayJob (one that has ended is deleted after ten minutes)") from error
    return found


def _parts(job: str) -> tuple[str, str]:
    """Returns namespace and name; what begins with `-` would be an option of kubectl."""
    namespace, slash, name = job.removeprefix(PREFIX).partition("/")
    if not slash or not namespace or not name or "/" in name or name.startswith("-") or namespace.startswith("-"):
        raise UsageError(f"{job} is not the name of a RayJob, such as {PREFIX}dist-ft/my-run-a1b2c")
    return namespace, name
