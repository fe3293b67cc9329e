"""Runs on Kubernetes through KubeRay: renders, submits and follows. Talks to a cluster with `kubectl` alone.

Who looks after them later is `kubernetes_job.py`. What a run's manifests are is `manifests.py`, what its paths
mean there `pod_paths.py`; what makes them wrong is `kuberay_rules.py` and `lint.py`.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
import uuid
from pathlib import Path
from typing import Any

import yaml

from dist_ft.config import load_config
from dist_ft.config.rules import check_sections
from dist_ft.errors import ConfigError, DistFtError, UsageError
from dist_ft.launchers.command import run_command
from dist_ft.launchers.kubernetes.lint import problems_of
from dist_ft.launchers.kubernetes.manifests import (
    RUN_LABEL,
    Manifest,
    for_run,
    only,
    pod_templates,
    shared_mount,
)
from dist_ft.launchers.kubernetes.pod_paths import on_volume
from dist_ft.launchers.launcher import SubmitRequest

NAMESPACE = "dist-ft"
PREFIX = "kubernetes:"
"""Of what a submitted run is called: `kubernetes:NAMESPACE/NAME`."""
_FIELD_MANAGER = "dist-ft"
FINAL = frozenset({"Complete", "Failed", "ValidationFailed"})
_STOPPED_EXIT_CODE = 3
KUBECTL_LIMIT_S = 120.0
_EXAMPLE_REGISTRY = "registry.example.com/"
"""Where the images of the shipped overlays are not."""


def render(
    request: SubmitRequest, overlay: Path, *, suffix: str, namespace: str = NAMESPACE, image: str | None = None
) -> list[Manifest]:
    """Returns the manifests of a run: its config, put into what `kubectl kustomize OVERLAY` builds.

    Args:
        request: What to run. Relative paths in its config are below the shared volume; without one all has URLs.
        overlay: Kustomization directory, such as `cluster/kuberay/overlays/gpu`.
        suffix: Tells this submission from earlier ones of the run.
        namespace: Where the objects go.
        image: In place of the overlay's.

    Raises:
        UserError: Config or overlay cannot run, with every problem found, one a line.
    """
    config = load_config(request.config_path, request.overrides)
    check_sections(config)
    if not (overlay / "kustomization.yaml").is_file():
        raise UsageError(f"overlay {overlay} has no kustomization.yaml; pass a directory such as "
                         "cluster/kuberay/overlays/gpu")  # fmt: skip
    built = [doc for doc in yaml.safe_load_all(kubectl("kustomize", str(overlay))) if doc]
    placed = on_volume(config, shared_mount(only(built, "RayJob")))
    manifests = for_run(built, placed, suffix=suffix, namespace=namespace, image=image)
    if not request.preflight:
        spec = only(manifests, "RayJob")["spec"]
        spec["entrypoint"] = spec["entrypoint"].replace(" --preflight", "")
    problems = problems_of(manifests) + _placeholders(manifests)
    if problems:
        raise ConfigError("\n".join(f"overlay {overlay}: {problem}" for problem in problems))
    return manifests


def submit(
    request: SubmitRequest, overlay: Path, *, namespace: str = NAMESPACE, image: str | None = None, poll_s: float = 2.0
) -> int:
    """Starts a run on the cluster of the current kubectl context; returns the exit code of design section 7.

    The API server sees everything in a dry run first. A run that was submitted before goes on from its last
    checkpoint, if `request.resume` says so; one that is still there is never started twice.

    Args:
        request: What to run; without `follow` the code is 0 once it is submitted.
        overlay: See `render`.
        namespace: Where it runs.
        image: In place of the overlay's.
        poll_s: Seconds between two looks while following.

    Raises:
        UserError: Nothing was started.
        DistFtError: The cluster refuses it, or cannot be reached.
    """
    manifests = render(request, overlay, suffix=uuid.uuid4().hex[:5], namespace=namespace, image=image)
    name = only(manifests, "RayJob")["metadata"]["name"]
    run = only(manifests, "RayJob")["metadata"]["labels"][RUN_LABEL]
    _check_not_there(run, namespace, request.resume)
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": manifests})
    apply = ("apply", "--server-side", f"--field-manager={_FIELD_MANAGER}", "-f", "-")
    kubectl(*apply, "--dry-run=server", stdin=text)
    kubectl(*apply, stdin=text)
    job = f"{PREFIX}{namespace}/{name}"
    print(f"submitted {job}\n  dist-ft status|logs|stop {job}", flush=True)
    return follow(name, namespace, poll_s=poll_s) if request.follow else 0


def follow(name: str, namespace: str = NAMESPACE, *, poll_s: float = 2.0) -> int:
    """Shows what a RayJob prints until it ends, over all its retries; returns its exit code.

    Ctrl-C ends the following, not the run.
    """
    said, shown = None, None
    while True:
        job = json.loads(kubectl("get", "rayjob", name, "-n", namespace, "-o", "json"))
        status = job.get("status", {})
        state = status.get("jobDeploymentStatus", "")
        if state in FINAL:
            print(f"{name}: {state} {status.get('message', '')}".rstrip(), flush=True)
            return exit_code(status)
        if state != said:
            print(f"{name}: {state or 'waiting for the operator'}", flush=True)
            said = state
        # Each try has a job id of its own; its submitter may not be there yet.
        if state == "Running" and shown != status.get("jobId") and _show_output(job, namespace):
            shown = status.get("jobId")
        time.sleep(poll_s)


def exit_code(status: dict[str, Any]) -> int:
    """Returns our exit code for the status of a RayJob that has ended; Kubernetes keeps it in a message only."""
    if status.get("jobDeploymentStatus") == "ValidationFailed":
        return UsageError.exit_code
    if status.get("jobStatus") in ("SUCCEEDED", "STOPPED"):
        return 0 if status["jobStatus"] == "SUCCEEDED" else _STOPPED_EXIT_CODE
    found = re.search(r"failed with exit code (\d+)", status.get("message", ""))
    return int(found[1]) if found else DistFtError.exit_code


def kubectl(*arguments: str, stdin: str | None = None, limit_s: float = KUBECTL_LIMIT_S) -> str:
    """Runs kubectl and returns what it prints. The only door to a cluster, but for the output of a run.

    Raises:
        UsageError: There is no kubectl.
        DistFtError: It failed, with its own words, or did not end within the limit.
    """
    return run_command(
        ["kubectl", *arguments],
        shown=f"kubectl {arguments[0]}",
        absent="install it (any version from 1.28) and point it at the cluster",
        question="is the cluster there?",
        limit_s=limit_s,
        stdin=stdin,
    )


def _placeholders(manifests: list[Manifest]) -> list[str]:
    templates = pod_templates(only(manifests, "RayJob"))
    images = {container["image"] for _, template in templates for container in template["spec"]["containers"]}
    return [
        f"image {image} is an example; build docker/Dockerfile, push it, and name it with --image or in the overlay"
        for image in sorted(images)
        if image.startswith(_EXAMPLE_REGISTRY)
    ]


def _jobs(run: str, namespace: str) -> list[Manifest]:
    found = kubectl("get", "rayjobs", "-n", namespace, "-l", f"{RUN_LABEL}={run}", "-o", "json")
    items: list[Manifest] = json.loads(found)["items"]
    return items


def _live(jobs: list[Manifest]) -> list[Manifest]:
    return [job for job in jobs if job.get("status", {}).get("jobDeploymentStatus") not in FINAL]


def _check_not_there(run: str, namespace: str, resume: bool) -> None:
    jobs = _jobs(run, namespace)
    live = [job["metadata"]["name"] for job in _live(jobs)]
    if live:
        raise UsageError(
            f"the run is at work as RayJob {live[0]} in namespace {namespace}; follow it, stop it first, or choose "
            "another run.name"
        )
    if jobs and not resume:
        raise UsageError(
            f"the run was submitted before as RayJob {jobs[-1]['metadata']['name']} in namespace {namespace}; go on "
            "with --resume, or choose another run.name"
        )


def output_of(job: Manifest) -> list[str]:
    """Returns what `kubectl logs` is asked for: the submitter, which is a pod of its own or a container of the head."""
    if job["spec"].get("submissionMode") == "SidecarMode":
        cluster = job.get("status", {}).get("rayClusterName", "")
        return ["-l", f"ray.io/cluster={cluster},ray.io/node-type=head", "-c", "ray-job-submitter", "--tail=-1"]
    return [f"job/{job['metadata']['name']}"]


def _show_output(job: Manifest, namespace: str) -> bool:
    """Streams the submitter's output until the job ends or the submitter is lost; returns whether there was one."""
    command = ["kubectl", "logs", "--follow", "--pod-running-timeout=60s", "-n", namespace, *output_of(job)]
    return subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0
