"""Finds what is wrong or unsafe in the manifests of a run although every schema accepts them.

Pure functions; each problem is one line.
"""

from __future__ import annotations

import importlib.metadata
import re
import shlex
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from pathlib import PurePosixPath

import yaml
from packaging.requirements import Requirement

from dist_ft.launchers.kubernetes.manifests import cluster_of, pod_templates
from dist_ft.launchers.kubernetes.object_types import Container, Manifest, PodSpec, PodTemplate, Spec
from dist_ft.launchers.kubernetes.operator_rules import operator_problems
from dist_ft.launchers.launcher import STOP_ENV

SERVE_APP = "dist_ft.serving.ray_app:from_config"
"""What a RayService starts."""
_GPU = "nvidia.com/gpu"
_SECRET_NAME = re.compile(r"(?:\b|_)(?:TOKEN|API_KEY|ACCESS_KEY|SECRET|PASSWORD|CREDENTIALS?)\b", re.IGNORECASE)
_PINNED = re.compile(r"@sha256:[0-9a-f]{64}$|:(?!latest$)[A-Za-z0-9_][A-Za-z0-9_.-]*$")
_UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_CONTAINER_SECURITY = {"allowPrivilegeEscalation": False, "privileged": False, "readOnlyRootFilesystem": True}


def problems_of(manifests: Sequence[Manifest]) -> list[str]:
    """Return every problem of a set of manifests that are applied together."""
    problems: list[str] = []
    rays = [manifest for manifest in manifests if manifest.get("kind") in ("RayJob", "RayCluster", "RayService")]
    for ray in rays:
        found = operator_problems(ray) + _ray_problems(ray)
        if ray["kind"] == "RayJob":
            found += _entrypoint_problems(ray, manifests) + _stop_problems(ray["spec"])
        if ray["kind"] == "RayService":
            found += _serve_problems(ray["spec"])
        problems += [f"{ray['kind']} {ray['metadata'].get('name')}: {problem}" for problem in found]
    templates = [template for ray in rays for _, template in pod_templates(ray)]
    for other in (m for m in manifests if m.get("kind") in ("StatefulSet", "Deployment")):
        template = other["spec"]["template"]
        templates.append(template)
        name = f"{other['kind']} {other['metadata'].get('name')}"
        claimed = {claim["metadata"]["name"] for claim in other["spec"].get("volumeClaimTemplates", [])}
        found = _pod_problems(template["spec"], claimed) + _tag_problems(template)
        problems += [f"{name}: {problem}" for problem in found]
    return problems + _selector_problems(manifests, templates)


def _ray_problems(ray: Manifest) -> list[str]:
    cluster = cluster_of(ray)
    pin = next(r.specifier for r in map(Requirement, importlib.metadata.requires("dist-ft") or []) if r.name == "ray")
    version = str(cluster.get("rayVersion", ""))
    problems = _image_problems(ray)
    if not version or not pin.contains(version):
        problems.insert(0, f"rayVersion={version} is not {pin}, which dist-ft is made for")
    if cluster.get("authOptions", {}).get("mode") != "token":
        problems.append("authOptions.mode is not token: whoever reaches a port of Ray runs code there; set it")
    cpus = (cluster.get("headGroupSpec", {}).get("rayStartParams") or {}).get("num-cpus")
    if cpus != "0":
        problems.append(f'head: rayStartParams.num-cpus={cpus!r} must be the string "0", or workers land on the head')
    for where, template in pod_templates(ray):
        problems += [f"{where}: {problem}" for problem in _pod_problems(template["spec"])]
    if cluster.get("enableInTreeAutoscaling"):
        found = _security_problems(cluster.get("autoscalerOptions", {}))
        problems += [f"autoscaler: {problem}" for problem in found]
    if _SECRET_NAME.search(str(ray["spec"].get("runtimeEnvYAML", ""))):
        problems.append("runtimeEnvYAML names a secret, and everybody sees it there; use secretKeyRef in a pod's env")
    return problems


def _image_problems(ray: Manifest) -> list[str]:
    images = {where: c.get("image", "") for where, t in pod_templates(ray) for c in t["spec"].get("containers", [])[:1]}
    problems = [f"{where}: {problem}" for where, template in pod_templates(ray) for problem in _tag_problems(template)]
    if len(set(images.values())) > 1:
        problems.append(f"images differ, but Ray and Python must be the same on all pods: {images}")
    return problems


def _tag_problems(template: PodTemplate) -> list[str]:
    images = [container.get("image", "") for container in template["spec"].get("containers", [])[:1]]
    return [
        f"image {image!r} is not pinned; give it a tag other than latest, or a digest"
        for image in images
        if not _PINNED.search(image)
    ]


def _pod_problems(pod: PodSpec, claimed: AbstractSet[str] = frozenset()) -> list[str]:
    """Check a pod; volumes named `claimed` come from elsewhere."""
    problems = []
    volumes = {volume["name"] for volume in pod.get("volumes", [])} | claimed
    security = pod.get("securityContext", {})
    if security.get("runAsNonRoot") is not True or not security.get("runAsUser"):
        problems.append("securityContext: set runAsNonRoot: true and runAsUser")
    if security.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        problems.append("securityContext: set seccompProfile.type: RuntimeDefault")
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(key):
            problems.append(f"{key} opens the machine to the pod; leave it out")
    for container in [*pod.get("initContainers", []), *pod.get("containers", [])]:
        problems += _security_problems(container) + _container_problems(container)
        mounts = [mount["name"] for mount in container.get("volumeMounts", [])]
        problems += [f"volumeMount {name} has no volume" for name in mounts if name not in volumes]
    return problems + _drain_problems(pod) + _memory_problems(pod)


def _security_problems(container: Container) -> list[str]:
    security = container.get("securityContext", {})
    wrong = [
        f"{key}: {str(value).lower()}" for key, value in _CONTAINER_SECURITY.items() if security.get(key) is not value
    ]
    if "ALL" not in security.get("capabilities", {}).get("drop", []):
        wrong.append("capabilities.drop: [ALL]")
    return [f"container {container.get('name', '')}: securityContext lacks {', '.join(wrong)}"] if wrong else []


def _container_problems(container: Container) -> list[str]:
    resources = container.get("resources", {})
    requests, limits = resources.get("requests", {}), resources.get("limits", {})
    problems = [f"resources: limits.{name} is missing" for name in ("cpu", "memory") if name not in limits]
    for name in sorted({name for name in {*requests, *limits} if "/" in name}):
        if requests.get(name) != limits.get(name):
            problems.append(
                f"resources: {name} requests {requests.get(name)} and limits {limits.get(name)} must be equal"
            )
    for variable in container.get("env", []):
        name = variable["name"]
        if _SECRET_NAME.search(name) and "value" in variable:
            problems.append(f"env {name} holds a secret in plain text; use valueFrom.secretKeyRef")
        reference = variable.get("valueFrom", {}).get("secretKeyRef")
        if reference is not None and not (reference.get("name") and reference.get("key")):
            problems.append(f"env {name}: secretKeyRef needs name and key")
    return problems


def _drain_problems(pod: PodSpec) -> list[str]:
    """Check that the grace period is longer than what a pod does before it ends."""
    grace_s = pod.get("terminationGracePeriodSeconds", 30)
    needed = [
        float(variable.get("value", 0))
        for container in pod.get("containers", [])
        for variable in container.get("env", [])
        if variable["name"] == "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
    ]
    for container in pod.get("containers", []):
        command = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
        if "--timeout" in command[:-1]:
            needed.append(float(command[command.index("--timeout") + 1]))
    return [
        f"terminationGracePeriodSeconds={grace_s} is not more than the {seconds:g} s that draining may take"
        for seconds in needed
        if seconds >= grace_s
    ]


def _memory_problems(pod: PodSpec) -> list[str]:
    """Check that volumes in memory leave room: they count towards the limit of the container that fills them."""
    in_memory = sum(
        size_bytes(volume["emptyDir"].get("sizeLimit", "0"))
        for volume in pod.get("volumes", [])
        if volume.get("emptyDir", {}).get("medium") == "Memory"
    )
    limit = next((c.get("resources", {}).get("limits", {}).get("memory") for c in pod.get("containers", [])), None)
    if limit is None or in_memory < size_bytes(limit):
        return []
    return [f"volumes in memory ({in_memory:g} bytes) fill the container's memory limit of {limit}"]


def size_bytes(quantity: str | int) -> float:
    """Return a memory quantity in bytes: `1Gi` is 2**30."""
    text = str(quantity)
    for unit, factor in _UNITS.items():
        if text.endswith(unit):
            return float(text.removesuffix(unit)) * factor
    return float(text)


def _entrypoint_problems(job: Manifest, manifests: Sequence[Manifest]) -> list[str]:
    """Check that the driver's config is mounted in the pod that runs the driver."""
    first, *words = shlex.split(job["spec"].get("entrypoint", "")) or [""]
    if first != "exec" or words[:2] != ["dist-ft", "train"] or len(words) < 3:
        return [f"entrypoint {' '.join([first, *words])!r} is not `exec dist-ft train CONFIG …`"]
    problems = [f"entrypoint lacks {word}" for word in ("--address", "--resume") if word not in words]
    on_worker = bool(job["spec"].get("entrypointNumCpus"))
    path = PurePosixPath(words[2])
    for where, template in pod_templates(job):
        if where != "submitter" and where.startswith("worker") == on_worker:
            problems += [f"{where}: {p}" for p in _config_problems(template["spec"], path, manifests)]
    return problems


def _serve_problems(spec: Spec) -> list[str]:
    """Check what Serve runs; the operator passes it on unread."""
    try:
        found = yaml.safe_load(spec.get("serveConfigV2", ""))
        paths = [application["import_path"] for application in found["applications"]]
        host, port = found["http_options"]["host"], found["http_options"]["port"]
    except (yaml.YAMLError, TypeError, KeyError):
        return ["serveConfigV2 has no `applications:` with import_path and `http_options:` with host and port"]
    problems = [f"serveConfigV2: import_path={path} is not {SERVE_APP}" for path in paths if path != SERVE_APP]
    if (host, port) != ("0.0.0.0", 8000):
        problems.append(f"serveConfigV2: http_options {host}:{port} is not 0.0.0.0:8000, where KubeRay's service looks")
    return problems


def _stop_problems(spec: Spec) -> list[str]:
    """Check Ray's two settings for stopping a job; its defaults end the job without a checkpoint."""
    try:
        found = (yaml.safe_load(spec.get("runtimeEnvYAML", "")) or {}).get("env_vars") or {}
        return [
            f"runtimeEnvYAML: env_vars.{name} is {found.get(name)}, not {value}; a stop would cut the checkpoint short"
            for name, value in STOP_ENV.items()
            if str(found.get(name)) != value
        ]
    except (yaml.YAMLError, AttributeError):
        return ["runtimeEnvYAML has no `env_vars:` that can be read"]


def _config_problems(pod: PodSpec, path: PurePosixPath, manifests: Sequence[Manifest]) -> list[str]:
    maps = {v["name"]: v["configMap"]["name"] for v in pod.get("volumes", []) if "configMap" in v}
    mounts = {m["mountPath"]: m["name"] for m in pod["containers"][0].get("volumeMounts", [])}
    name = maps.get(mounts.get(str(path.parent), ""))
    if name is None:
        return [f"no ConfigMap is mounted at {path.parent}, where the entrypoint looks for {path.name}"]
    for manifest in manifests:
        if manifest.get("kind") == "ConfigMap" and manifest["metadata"].get("name") == name:
            return [] if path.name in (manifest.get("data") or {}) else [f"ConfigMap {name} has no key {path.name}"]
    return [f"there is no ConfigMap {name}"]


def _selector_problems(manifests: Sequence[Manifest], templates: Sequence[PodTemplate]) -> list[str]:
    """Check that each selector matches a pod; one that matches none fails silently."""
    problems = []
    for manifest in manifests:
        if manifest.get("kind") not in ("PodDisruptionBudget", "NetworkPolicy"):
            continue
        spec = manifest["spec"]
        is_budget = manifest["kind"] == "PodDisruptionBudget"
        wanted = (spec.get("selector", {}) if is_budget else spec.get("podSelector", {})).get("matchLabels", {})
        if not any(wanted.items() <= template.get("metadata", {}).get("labels", {}).items() for template in templates):
            name = f"{manifest['kind']} {manifest['metadata'].get('name')}"
            problems.append(f"{name}: no pod has the labels that it selects ({wanted})")
    return problems
