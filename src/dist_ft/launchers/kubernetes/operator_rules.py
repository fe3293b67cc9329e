"""Finds what the KubeRay operator (1.7) refuses although the API server accepts it.

No schema contains these rules, and the operator reports them only as an event on an object that never starts. Ported
from its `controllers/ray/utils/validation.go`.
"""

from __future__ import annotations

import re

import yaml
from packaging.version import InvalidVersion, Version

from dist_ft.launchers.kubernetes.object_types import ClusterSpec, Group, Manifest, Spec

MAX_NAME = {"RayJob": 47, "RayCluster": 53, "RayService": 47}
_DNS_1035 = re.compile(r"^[a-z]([-a-z0-9]*[a-z0-9])?$")
_TOKEN_SINCE = Version("2.52.0")
_MODES = ("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode")
_UPGRADES = ("NewCluster", "None")  # the incremental one needs an autoscaler and a Gateway, which we have not
_GATED = {
    "networkPolicy": "write a NetworkPolicy of your own",
    "tlsOptions": "set Ray's TLS variables yourself",
    "historyServerOptions": "leave it out",
}
"""Keys of the schema that are behind feature gates, off by default."""


def operator_problems(manifest: Manifest) -> list[str]:
    """Return the problems of a RayJob, RayCluster or RayService; none for other kinds."""
    kind = manifest.get("kind")
    if kind not in MAX_NAME:
        return []
    name = manifest["metadata"].get("name", "")
    problems = []
    if len(name) > MAX_NAME[kind] or not _DNS_1035.match(name):
        problems.append(f"metadata.name={name}: expected at most {MAX_NAME[kind]} of a-z, 0-9 and `-`, a letter first")
    spec = manifest["spec"]
    annotations = manifest["metadata"].get("annotations") or {}
    if kind == "RayCluster":
        return problems + _cluster_problems(spec, annotations)
    if kind == "RayService":
        return problems + _service_problems(spec) + _cluster_problems(spec.get("rayClusterConfig", {}), annotations)
    problems += _job_problems(spec)
    return problems + (_cluster_problems(spec["rayClusterSpec"], annotations) if "rayClusterSpec" in spec else [])


def _job_problems(spec: Spec) -> list[str]:
    problems = []
    mode, selects = spec.get("submissionMode", "K8sJobMode"), bool(spec.get("clusterSelector"))
    shuts_down, retries = spec.get("shutdownAfterJobFinishes", False), spec.get("backoffLimit", 0)
    if mode not in _MODES:
        problems.append(f"submissionMode={mode} is none of {', '.join(_MODES)}")
    if selects == ("rayClusterSpec" in spec):
        problems.append("set one of rayClusterSpec and clusterSelector")
    if spec.get("suspend") and (selects or not shuts_down):
        problems.append("suspend needs shutdownAfterJobFinishes: true, and no clusterSelector")
    if spec.get("ttlSecondsAfterFinished", 0) and not shuts_down:
        problems.append("ttlSecondsAfterFinished needs shutdownAfterJobFinishes: true")
    if retries and (selects or mode == "InteractiveMode"):
        problems.append(f"backoffLimit={retries} goes neither with clusterSelector nor with InteractiveMode")
    limits = {
        "activeDeadlineSeconds": spec.get("activeDeadlineSeconds", 1),
        "preRunningDeadlineSeconds": spec.get("preRunningDeadlineSeconds", 1),
    }
    problems += [f"{key}={limit} must be more than 0" for key, limit in limits.items() if limit <= 0]
    counts = {"backoffLimit": retries, "ttlSecondsAfterFinished": spec.get("ttlSecondsAfterFinished", 0)}
    problems += [f"{key}={count} must not be negative" for key, count in counts.items() if count < 0]
    if mode == "SidecarMode":
        problems += [
            f"SidecarMode takes no {key}" for key in ("submitterPodTemplate", "submitterConfig") if key in spec
        ]
        head = spec.get("rayClusterSpec", {}).get("headGroupSpec", {})
        problems += _restarts("SidecarMode", "head", head)
    strategy = spec.get("deletionStrategy", {})
    if rules := strategy.get("deletionRules"):
        if shuts_down or "onSuccess" in strategy or "onFailure" in strategy:
            problems.append("deletionRules go neither with shutdownAfterJobFinishes nor with onSuccess or onFailure")
        deletes_workers = any(rule.get("policy") == "DeleteWorkers" for rule in rules)
        if deletes_workers and spec.get("rayClusterSpec", {}).get("enableInTreeAutoscaling"):
            problems.append("the deletion policy DeleteWorkers does not go with enableInTreeAutoscaling")
    try:
        yaml.safe_load(spec.get("runtimeEnvYAML", ""))
    except yaml.YAMLError as error:
        problems.append(f"runtimeEnvYAML is not valid YAML: {error}")
    return problems


def _service_problems(spec: Spec) -> list[str]:
    problems = []
    upgrade = spec.get("upgradeStrategy", {}).get("type", "NewCluster")
    if upgrade not in _UPGRADES:
        problems.append(f"upgradeStrategy.type={upgrade} is none of {', '.join(_UPGRADES)}")
    if (delay := spec.get("rayClusterDeletionDelaySeconds", 0)) < 0:
        problems.append(f"rayClusterDeletionDelaySeconds={delay} must not be negative")
    return problems


def _cluster_problems(spec: ClusterSpec, annotations: dict[str, str]) -> list[str]:
    problems = [f"{key} is switched off in KubeRay 1.7; {remedy}" for key, remedy in _GATED.items() if key in spec]
    head, groups = spec.get("headGroupSpec", {}), spec.get("workerGroupSpecs", [])
    is_elastic = bool(spec.get("enableInTreeAutoscaling"))
    problems += _group_problems("head", head)
    for group in groups:
        where = f"worker group {group.get('groupName')}"
        problems += _group_problems(where, group)
        lowest, highest = group.get("minReplicas"), group.get("maxReplicas")
        if not is_elastic and (lowest is None or highest is None):
            problems.append(f"{where}: set minReplicas and maxReplicas where there is no autoscaler")
        if any(number is not None and number < 0 for number in (lowest, highest)):
            problems.append(f"{where}: minReplicas={lowest}, maxReplicas={highest} must not be negative")
        if lowest is not None and highest is not None and lowest > highest:
            problems.append(f"{where}: minReplicas={lowest} is more than maxReplicas={highest}")
    containers = head.get("template", {}).get("spec", {}).get("containers", [])
    variables = {variable["name"] for variable in (containers[0].get("env", []) if containers else [])}
    options = spec.get("autoscalerOptions", {})
    if is_elastic and options.get("version") == "v2":
        problems += _restarts("autoscaler v2", "head", head)
        for group in groups:
            problems += _restarts("autoscaler v2", f"worker group {group.get('groupName')}", group)
    if "RAY_enable_autoscaler_v2" in variables:
        problems.append(
            "head: RAY_enable_autoscaler_v2 is set by autoscalerOptions.version: v2; leave the variable out"
        )
    if options.get("idleTimeoutSeconds", 0) < 0:
        problems.append(f"autoscalerOptions.idleTimeoutSeconds={options['idleTimeoutSeconds']} must not be negative")
    if spec.get("authOptions", {}).get("mode") == "token":
        written = str(spec.get("rayVersion", ""))
        try:
            is_new_enough = Version(written) >= _TOKEN_SINCE
        except InvalidVersion:
            is_new_enough = False
        if not is_new_enough:
            problems.append(f"authOptions.mode=token needs rayVersion of {_TOKEN_SINCE} or later, not {written!r}")
    return problems + _fault_tolerance_problems(spec, head, variables, annotations)


def _group_problems(where: str, group: Group) -> list[str]:
    problems = []
    if not group.get("template", {}).get("spec", {}).get("containers"):
        problems.append(f"{where}: its pod has no container")
    parameters = group.get("rayStartParams") or {}
    if group.get("resources"):
        both = [key for key in ("num-cpus", "num-gpus", "memory", "resources") if key in parameters]
        problems += [f"{where}: {key} stands in rayStartParams, and the group has resources; keep one" for key in both]
    if "labels" in parameters:
        problems.append(f"{where}: rayStartParams.labels is refused; use the group's labels")
    return problems


def _restarts(because: str, where: str, group: Group) -> list[str]:
    policy = group.get("template", {}).get("spec", {}).get("restartPolicy", "Never")
    return [] if policy == "Never" else [f"{where}: restartPolicy={policy} must be Never with {because}"]


def _fault_tolerance_problems(
    spec: ClusterSpec, head: Group, variables: set[str], annotations: dict[str, str]
) -> list[str]:
    problems = []
    if "gcsFaultToleranceOptions" not in spec:
        if "RAY_REDIS_ADDRESS" in variables:
            problems.append("head: RAY_REDIS_ADDRESS needs gcsFaultToleranceOptions; set redisAddress there")
        return problems
    options = spec["gcsFaultToleranceOptions"]
    taken = {"RAY_REDIS_ADDRESS": "redisAddress", "REDIS_PASSWORD": "redisPassword", "REDIS_USERNAME": "redisUsername"}
    problems += [
        f"head: {name} stands beside gcsFaultToleranceOptions; use its {key}"
        for name, key in taken.items()
        if name in variables
    ]
    if "redis-password" in (head.get("rayStartParams") or {}):
        problems.append("head: redis-password stands beside gcsFaultToleranceOptions; use its redisPassword")
    for annotation in ("ray.io/ft-enabled", "ray.io/external-storage-namespace"):
        if annotations.get(annotation):
            problems.append(f"annotation {annotation} does not go with gcsFaultToleranceOptions")
    if options.get("backend") == "rocksdb":
        problems.append("gcsFaultToleranceOptions.backend=rocksdb is switched off in KubeRay 1.7; use Redis")
    return problems
