"""Renders a run config and an overlay to checked manifests. Calls `kubectl kustomize`, but asks no cluster."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from dist_ft.config import load_config
from dist_ft.config.rules import check_sections
from dist_ft.errors import ConfigError, UsageError
from dist_ft.launchers.kubernetes.kubectl import kubectl
from dist_ft.launchers.kubernetes.lint import problems_of
from dist_ft.launchers.kubernetes.manifests import (
    RUN_DIR,
    RUN_LABEL,
    for_run,
    only,
    pod_templates,
    shared_mount,
)
from dist_ft.launchers.kubernetes.object_types import Manifest
from dist_ft.launchers.kubernetes.pod_paths import on_volume
from dist_ft.launchers.launcher import SubmitRequest

NAMESPACE = "dist-ft"
_EXAMPLE_REGISTRY = "registry.example.com/"
"""Registry that the shipped overlays name as an example; no image is there."""


@dataclass(frozen=True)
class RenderedRun:
    """A run as objects of Kubernetes.

    Attributes:
        manifests: To be applied together.
        name: Of its RayJob.
        run_label: What all objects of the run are labelled with.
        run_dir: Path in the pods, or URL.
    """

    manifests: tuple[Manifest, ...]
    name: str
    run_label: str
    run_dir: str


def render(
    request: SubmitRequest, overlay: Path, *, suffix: str, namespace: str = NAMESPACE, image: str | None = None
) -> RenderedRun:
    """Render the manifests of a run: puts its config into what `kubectl kustomize OVERLAY` builds.

    Args:
        request: What to run. Relative paths in its config are below the shared volume; without one all has URLs.
        overlay: Kustomization directory, such as `cluster/kuberay/overlays/gpu`.
        suffix: Tells this submission from earlier ones of the run.
        namespace: Where the objects go.
        image: Replaces the overlay's image.

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
    ray_job = only(manifests, "RayJob")
    if not request.preflight:
        ray_job["spec"]["entrypoint"] = ray_job["spec"]["entrypoint"].replace(" --preflight", "")
    problems = problems_of(manifests)
    images = {c["image"] for _, template in pod_templates(ray_job) for c in template["spec"]["containers"]}
    problems += [
        f"image {image} is an example; build docker/Dockerfile, push it, and name it with --image or in the overlay"
        for image in sorted(images)
        if image.startswith(_EXAMPLE_REGISTRY)
    ]
    if problems:
        raise ConfigError("\n".join(f"overlay {overlay}: {problem}" for problem in problems))
    metadata = ray_job["metadata"]
    return RenderedRun(
        tuple(manifests), metadata["name"], metadata["labels"][RUN_LABEL], metadata["annotations"][RUN_DIR]
    )
