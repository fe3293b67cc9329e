"""One thing wrong at a time: each is refused, and the words name it. What passes here would have reached a cluster."""

from __future__ import annotations

from typing import Any

import pytest

from dist_ft.launchers.kubernetes.lint import SERVE_APP, problems_of
from tests.k8s import crd, overlays

pytestmark = pytest.mark.skipif(not overlays.is_kubectl_there(), reason=overlays.WHY_ABSENT)

GONE = object()
HEAD = "spec/rayClusterSpec/headGroupSpec"
HEAD_POD = f"{HEAD}/template/spec"
HEAD_CONTAINER = f"{HEAD_POD}/containers/0"
GROUP = "spec/rayClusterSpec/workerGroupSpecs/0"
POD = f"{GROUP}/template/spec"
CONTAINER = f"{POD}/containers/0"
SERVED = "http_options: {{host: 0.0.0.0, port: {port}}}\napplications: [{{import_path: '{path}'}}]"
PLAIN = {"name": "HF_TOKEN", "value": "hf_x"}
NO_KEY = {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "dist-ft-secrets"}}}

# overlay, kind, path, value in its place, words of the refusal
LINT = [
    ("gpu", "RayJob", "spec/submissionMode", "K8s", "submissionMode=K8s"),
    ("gpu", "RayJob", f"{GROUP}/minReplicas", 5, "minReplicas=5 is more than maxReplicas=2"),
    ("gpu", "RayJob", f"{GROUP}/minReplicas", GONE, "set minReplicas and maxReplicas"),
    ("gpu", "RayJob", f"{GROUP}/maxReplicas", -1, "must not be negative"),
    ("gpu", "RayJob", "metadata/name", "x" * 48, "at most 47"),
    ("gpu", "RayJob", "metadata/name", "My_Run", "metadata.name=My_Run"),
    ("gpu", "RayJob", "spec/backoffLimit", -1, "backoffLimit=-1"),
    ("gpu", "RayJob", "spec/preRunningDeadlineSeconds", 0, "preRunningDeadlineSeconds=0"),
    ("gpu", "RayJob", "spec/submissionMode", "InteractiveMode", "InteractiveMode"),
    ("gpu", "RayJob", "spec/submissionMode", "SidecarMode", "SidecarMode takes no submitterPodTemplate"),
    ("gpu", "RayJob", "spec/clusterSelector", {"ray.io/cluster": "c"}, "one of rayClusterSpec and clusterSelector"),
    ("gpu", "RayJob", "spec/shutdownAfterJobFinishes", False, "ttlSecondsAfterFinished needs"),
    ("kueue", "RayJob", "spec/shutdownAfterJobFinishes", False, "suspend needs"),
    ("gpu", "RayJob", "spec/runtimeEnvYAML", "a: [", "runtimeEnvYAML is not valid YAML"),
    ("gpu", "RayJob", "spec/runtimeEnvYAML", "env_vars: {HF_TOKEN: x}", "runtimeEnvYAML names a secret"),
    ("gpu", "RayJob", "spec/runtimeEnvYAML", GONE, "RAY_JOB_STOP_SIGNAL is None, not SIGINT"),
    ("gpu", "RayJob", "spec/runtimeEnvYAML", "env_vars: {RAY_JOB_STOP_WAIT_TIME_S: 100}", "_TIME_S is 100, not 900"),
    ("gpu", "RayJob", "spec/runtimeEnvYAML", "env_vars: [a]", "no `env_vars:` that can be read"),
    ("gpu", "RayJob", "spec/rayClusterSpec/rayVersion", "2.59.0", "rayVersion=2.59.0"),
    ("gpu", "RayJob", "spec/rayClusterSpec/rayVersion", "2.40.0", "needs rayVersion of 2.52.0"),
    ("gpu", "RayJob", "spec/rayClusterSpec/authOptions/mode", "disabled", "authOptions.mode is not token"),
    ("gpu", "RayJob", "spec/rayClusterSpec/networkPolicy", {}, "networkPolicy is switched off"),
    ("gpu", "RayJob", f"{HEAD}/rayStartParams/num-cpus", "8", "num-cpus='8'"),
    ("gpu", "RayJob", f"{HEAD}/rayStartParams/num-cpus", GONE, "num-cpus=None"),
    ("gpu", "RayJob", f"{HEAD}/rayStartParams/labels", "a=b", "rayStartParams.labels is refused"),
    ("gpu", "RayJob", f"{HEAD_CONTAINER}/image", "dist-ft:latest", "is not pinned"),
    ("gpu", "RayJob", f"{HEAD_CONTAINER}/image", "dist-ft", "is not pinned"),
    ("gpu", "RayJob", f"{CONTAINER}/image", "dist-ft:0.2.0", "images differ"),
    ("gpu", "RayJob", f"{CONTAINER}/env/0", PLAIN, "HF_TOKEN holds a secret in plain text"),
    ("s3", "RayJob", f"{CONTAINER}/env/0", {"name": "AWS_SECRET_ACCESS_KEY", "value": "k"}, "secret in plain text"),
    ("s3", "RayJob", f"{CONTAINER}/volumeMounts/0/name", "shared", "volumeMount shared has no volume"),
    ("gpu", "RayJob", f"{CONTAINER}/env/0", NO_KEY, "secretKeyRef needs name and key"),
    ("gpu", "RayJob", f"{HEAD_CONTAINER}/env/0", {"name": "RAY_REDIS_ADDRESS", "value": "r:1"}, "RAY_REDIS_ADDRESS"),
    ("gcs-ft", "RayJob", f"{HEAD_CONTAINER}/env/0", {"name": "RAY_REDIS_ADDRESS", "value": "r:1"}, "use its redisAddr"),
    ("gcs-ft", "RayJob", f"{HEAD}/rayStartParams/redis-password", "x", "use its redisPassword"),
    ("gcs-ft", "RayJob", "spec/rayClusterSpec/gcsFaultToleranceOptions/backend", "rocksdb", "rocksdb is switched off"),
    ("gpu", "RayJob", f"{CONTAINER}/resources/requests/nvidia.com~gpu", 4, "nvidia.com/gpu requests 4 and limits 8"),
    ("rdma", "RayJob", f"{CONTAINER}/resources/limits/rdma~ib", GONE, "rdma/ib requests 1 and limits None"),
    ("gpu", "RayJob", f"{CONTAINER}/resources/limits/memory", GONE, "limits.memory is missing"),
    ("gpu", "RayJob", f"{CONTAINER}/resources/limits/memory", "16Gi", "volumes in memory"),
    ("gpu", "RayJob", f"{POD}/volumes/1", GONE, "volumeMount shm has no volume"),
    ("gpu", "RayJob", f"{POD}/securityContext/runAsNonRoot", False, "runAsNonRoot"),
    ("gpu", "RayJob", f"{POD}/securityContext/seccompProfile", GONE, "seccompProfile"),
    ("gpu", "RayJob", f"{CONTAINER}/securityContext/readOnlyRootFilesystem", GONE, "readOnlyRootFilesystem: true"),
    ("gpu", "RayJob", f"{CONTAINER}/securityContext/capabilities", GONE, "capabilities.drop"),
    ("gpu", "RayJob", f"{POD}/hostNetwork", True, "hostNetwork"),
    ("gpu", "RayJob", f"{POD}/terminationGracePeriodSeconds", 60, "is not more than the 100 s"),
    ("gpu", "RayJob", f"{HEAD_POD}/terminationGracePeriodSeconds", 120, "is not more than the 120 s"),
    ("gpu", "RayJob", "spec/entrypoint", "exec dist-ft tain /config/config.yaml", "is not `exec dist-ft"),
    ("gpu", "RayJob", "spec/entrypoint", "", "is not `exec dist-ft"),
    ("gpu", "RayJob", "spec/entrypoint", "dist-ft train /config/config.yaml", "is not `exec dist-ft"),
    ("gpu", "RayJob", "spec/entrypoint", "exec dist-ft train /config/config.yaml --address auto", "lacks --resume"),
    ("gpu", "RayJob", "spec/entrypoint", "exec dist-ft train /c/run.yaml --address auto --resume", "no ConfigMap is"),
    ("gpu", "RayJob", f"{HEAD_POD}/volumes/3/configMap/name", "other", "there is no ConfigMap other"),
    ("gpu", "ConfigMap", "data", {"run.yaml": ""}, "has no key config.yaml"),
    ("gpu", "PodDisruptionBudget", "spec/selector/matchLabels/dist-ft~run", "other", "no pod has the labels"),
    ("gpu", "NetworkPolicy", "spec/podSelector/matchLabels/dist-ft~run", "other", "no pod has the labels"),
    ("autoscaling", "RayJob", f"{HEAD_POD}/restartPolicy", "Always", "must be Never with autoscaler v2"),
    ("autoscaling", "RayJob", f"{POD}/restartPolicy", "OnFailure", "must be Never with autoscaler v2"),
    ("autoscaling", "RayJob", "spec/rayClusterSpec/autoscalerOptions/securityContext", GONE, "autoscaler: container"),
    ("serve", "RayService", "spec/serveConfigV2", "a: [", "serveConfigV2 has no `applications:`"),
    ("serve", "RayService", "spec/serveConfigV2", SERVED.format(path="other:app", port=8000), "import_path=other:app"),
    ("serve", "RayService", "spec/serveConfigV2", SERVED.format(path=SERVE_APP, port=9000), "is not 0.0.0.0:8000"),
    ("serve", "RayService", "spec/upgradeStrategy", {"type": "Sometimes"}, "upgradeStrategy.type=Sometimes"),
    ("serve", "RayService", "spec/rayClusterConfig/authOptions/mode", "disabled", "authOptions.mode is not token"),
    ("serve", "RayService", "metadata/name", "x" * 48, "at most 47"),
    ("sidecar-submit", "RayJob", f"{HEAD_POD}/restartPolicy", "Always", "must be Never with SidecarMode"),
]  # fmt: skip

SCHEMA = [
    ("gpu", "RayJob", "spec/backofLimit", 3, "'backofLimit' was unexpected"),
    ("gpu", "RayJob", f"{POD}/terminationGracePeriod", 3, "'terminationGracePeriod' was unexpected"),
    ("gpu", "RayJob", f"{CONTAINER}/volumeMount", [], "'volumeMount' was unexpected"),
    ("gpu", "RayJob", f"{GROUP}/replicas", "two", "replicas: 'two' is not of type 'integer'"),
    ("gpu", "RayJob", f"{GROUP}/groupName", GONE, "'groupName' is a required property"),
    ("gpu", "RayJob", f"{HEAD}/rayStartParams/num-cpus", 0, "num-cpus: 0 is not of type 'string'"),
    ("gpu", "RayJob", f"{CONTAINER}/resources/limits/memory", "500GBB", "'500GBB' does not match"),
    ("gpu", "RayJob", f"{CONTAINER}/env/0", NO_KEY, "'key' is a required property"),
    ("gpu", "RayJob", f"{HEAD_CONTAINER}/ports/1/containerPort", 6379, "stands twice"),
    ("gpu", "RayJob", f"{POD}/tolerations", {"key": "a"}, "tolerations: "),
    ("gpu", "RayJob", f"{CONTAINER}/name", GONE, "'name' is a required property"),
    ("autoscaling", "RayJob", "spec/rayClusterSpec/autoscalerOptions/version", "v3", "'v3' is not one of"),
    ("serve", "RayService", "spec/rayClusterConfig/headGroup", {}, "'headGroup' was unexpected"),
    ("shared", "RayCluster", "spec/headGroup", {}, "'headGroup' was unexpected"),
    ("shared", "RayCluster", "spec/authOptions/mode", "tokn", "'tokn' is not one of"),
]  # fmt: skip


def _mutated(overlay: str, kind: str, path: str, value: Any) -> list[dict[str, Any]]:
    docs = overlays.build(overlay)
    node: Any = overlays.find(docs, kind)
    *parents, last = (int(part) if part.isdigit() else part.replace("~", "/") for part in path.split("/"))
    for part in parents:
        node = node[part]
    if value is GONE:
        del node[last]
    else:
        node[last] = value
    return docs


def _name(value: Any) -> str | None:
    return value.split("/", 1)[-1] if isinstance(value, str) else None


@pytest.mark.parametrize(("overlay", "kind", "path", "value", "words"), LINT, ids=_name)
def test_the_lint_refuses(overlay: str, kind: str, path: str, value: Any, words: str) -> None:
    problems = problems_of(_mutated(overlay, kind, path, value))
    assert [problem for problem in problems if words in problem], problems


@pytest.mark.skipif(not crd.are_there(), reason=crd.WHY_ABSENT)
@pytest.mark.parametrize(("overlay", "kind", "path", "value", "words"), SCHEMA, ids=_name)
def test_the_schema_refuses(overlay: str, kind: str, path: str, value: Any, words: str) -> None:
    problems = [p for doc in _mutated(overlay, kind, path, value) for p in crd.schema_problems(doc)]
    assert [problem for problem in problems if words in problem], problems
