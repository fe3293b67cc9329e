"""Turns a run config and the manifests of an overlay into the manifests of one run. Pure: no kubectl, no files.

Objects of the overlay that belong to the administrator (volume, accounts) are left out.
"""

from __future__ import annotations

import copy
import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from dist_ft.config import Config, dump_set_keys
from dist_ft.errors import ConfigError, UsageError
from dist_ft.launchers.kubernetes.object_types import ClusterSpec, Group, Manifest, PodTemplate
from dist_ft.machine import worker_resources, workers_on

RUN_LABEL = "dist-ft/run"
"""Label of all objects of a run, pods included."""
RUN_DIR = "dist-ft/run-dir"
"""Annotation of a RayJob: its run directory, a path in its pods or a URL."""
CONFIG_KEY = "config.yaml"
"""The run config's key in the ConfigMap, and its file name in the driver's pod."""
_MAX_SLUG = 40  # a RayJob's name has at most 47 characters: six are left for `-` and a suffix


def slug(run_name: str) -> str:
    """Return a run's name in the form of DNS-1035. Different names give different results."""
    plain = re.sub(r"[^a-z0-9]+", "-", run_name.lower()).strip("-")
    if not plain[:1].isalpha():
        plain = f"r-{plain}"
    if plain == run_name and len(plain) <= _MAX_SLUG:
        return plain
    digest = hashlib.sha256(run_name.encode()).hexdigest()[:6]
    return f"{plain[: _MAX_SLUG - 7].rstrip('-')}-{digest}"


def only(manifests: Sequence[Manifest], kind: str) -> Manifest:
    """Return the one manifest of a kind.

    Raises:
        UsageError: There is none, or more than one.
    """
    found = [manifest for manifest in manifests if manifest.get("kind") == kind]
    if len(found) != 1:
        raise UsageError(f"the overlay has {len(found)} objects of kind {kind}, expected one")
    return found[0]


def cluster_of(ray: Manifest) -> ClusterSpec:
    """Return the cluster of a RayCluster, RayJob or RayService."""
    spec = ray["spec"]
    if ray["kind"] == "RayService":
        return spec.get("rayClusterConfig", {})
    return spec if ray["kind"] == "RayCluster" else spec.get("rayClusterSpec", {})


def pod_templates(ray_job: Manifest) -> Iterator[tuple[str, PodTemplate]]:
    """Yield `(where, template)` of every pod of an object of KubeRay's: submitter, head, each worker group."""
    spec = ray_job["spec"]
    if "submitterPodTemplate" in spec:
        yield "submitter", spec["submitterPodTemplate"]
    cluster = cluster_of(ray_job)
    if "headGroupSpec" in cluster:
        yield "head", cluster["headGroupSpec"]["template"]
    for group in cluster.get("workerGroupSpecs", []):
        yield f"worker group {group.get('groupName')}", group["template"]


def shared_mount(ray_job: Manifest) -> str | None:
    """Return where the head mounts the shared volume; None where it mounts none."""
    pod = dict(pod_templates(ray_job))["head"]["spec"]
    claims = {volume["name"] for volume in pod.get("volumes", []) if "persistentVolumeClaim" in volume}
    for mount in pod["containers"][0].get("volumeMounts", []):
        if mount["name"] in claims:
            return str(mount["mountPath"])
    return None


def for_run(
    manifests: Sequence[Manifest], config: Config, *, suffix: str, namespace: str, image: str | None = None
) -> list[Manifest]:
    """Return the manifests of one run.

    Args:
        manifests: What the overlay builds; must hold one RayJob and one ConfigMap.
        config: Checked, with paths as pods see them (`pod_paths.on_volume`).
        suffix: Tells this submission's RayJob from earlier ones of the run; at most six characters.
        namespace: Where the objects go.
        image: In place of the overlay's, for all of Ray's containers.

    Raises:
        ConfigError: The overlay's machines cannot hold the workers.
        UsageError: The overlay is not one for a run.
    """
    run = slug(config.run.name)
    labelled = [m for m in manifests if RUN_LABEL in (m.get("metadata", {}).get("labels") or {})]
    own = copy.deepcopy(labelled)
    ray_job, config_map = only(own, "RayJob"), only(own, "ConfigMap")
    config_map["data"] = {CONFIG_KEY: dump_set_keys(config)}
    names = {"RayJob": f"{run}-{suffix}", "ConfigMap": f"dist-ft-config-{run}"}
    run_dir = config.run.address
    ray_job["metadata"].setdefault("annotations", {})[RUN_DIR] = run_dir
    _fit_workers(ray_job["spec"]["rayClusterSpec"], config)
    for _, template in pod_templates(ray_job):
        pod = template["spec"]
        for volume in pod.get("volumes", []):
            if volume.get("configMap", {}).get("name") == config_map["metadata"]["name"]:
                volume["configMap"]["name"] = names["ConfigMap"]
        for container in pod["containers"]:
            command = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
            if command[:2] == ["dist-ft", "stop"]:
                command[2] = run_dir
        if image is not None:
            pod["containers"][0]["image"] = image
    for manifest in own:
        _relabel(manifest, run)
        metadata = manifest["metadata"]
        metadata["name"] = names.get(manifest["kind"], f"{metadata['name']}-{run}")
        metadata["namespace"] = namespace
    return own


def _relabel(node: Any, run: str) -> None:
    """Replace the run in every label and selector below a node."""
    if isinstance(node, list):
        for item in node:
            _relabel(item, run)
    elif isinstance(node, dict):
        if isinstance(node.get(RUN_LABEL), str):
            node[RUN_LABEL] = run
        for item in node.values():
            _relabel(item, run)


def slots(group: Group, config: Config) -> int:
    """Return how many workers a pod of a worker group holds, by its GPUs or, without GPUs, by its CPUs."""
    limits = group["template"]["spec"]["containers"][0].get("resources", {}).get("limits", {})
    has = {"GPU": float(limits.get("nvidia.com/gpu", 0))}
    if "cpu" in limits:  # else all that the pod's node has
        has["CPU"] = cores(limits["cpu"])
    worker = worker_resources(config.cluster.resources_per_worker, has_gpu=has["GPU"] > 0)
    return workers_on(has, {name: amount for name, amount in worker.items() if name in has}) or 0


def cores(quantity: str | int | float) -> float:
    """Return a CPU quantity as a number: `500m` is a half.

    Raises:
        ValueError: It is none.
    """
    text = str(quantity)
    return float(text[:-1]) / 1000 if text.endswith("m") else float(text)


def _fit_workers(cluster: ClusterSpec, config: Config) -> None:
    """Set the number of pods so that the workers fit.

    One group holds them all. Of two, the first holds the fewest that the run goes on with, the second the rest. Where
    there are more, the overlay's numbers stand. Without an autoscaler pods cannot be added: all are asked for.
    """
    groups = cluster.get("workerGroupSpecs", [])
    fewest, most = config.cluster.min_workers, config.cluster.max_workers
    room = [slots(group, config) for group in groups]
    is_elastic = bool(cluster.get("enableInTreeAutoscaling"))
    if not groups or not all(room):
        raise ConfigError(
            f"cluster.resources_per_worker={config.cluster.resources_per_worker}: a worker pod of the overlay holds "
            "none; raise the limits of its container, or lower it"
        )
    if len(groups) == 1:
        highest = math.ceil(most / room[0])
        lowest = math.ceil(fewest / room[0]) if is_elastic else highest
        _set_replicas(groups[0], lowest, highest)
    elif len(groups) == 2 and is_elastic:
        lowest = math.ceil(fewest / room[0])
        _set_replicas(groups[0], lowest, lowest)
        _set_replicas(groups[1], 0, math.ceil(max(0, most - lowest * room[0]) / room[1]))
    at_start = sum(group.get("replicas", 0) * each for group, each in zip(groups, room, strict=True))
    if at_start < fewest:
        raise ConfigError(
            f"cluster.num_workers={config.cluster.num_workers}: the overlay starts with room for {at_start}; raise the "
            "replicas of its worker groups"
        )


def _set_replicas(group: Group, lowest: int, highest: int) -> None:
    group["replicas"], group["minReplicas"], group["maxReplicas"] = lowest, lowest, highest
