"""`make launch-tests`: a real API server's word on every overlay, on rights, and on faults that no schema sees."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from dist_ft.launchers.kubernetes.manifests import pod_templates
from tests.k8s import overlays, server

WHY_ABSENT = server.why_absent()
pytestmark = [
    pytest.mark.apiserver,
    pytest.mark.skipif(WHY_ABSENT is not None, reason=str(WHY_ABSENT)),
    pytest.mark.timeout(600),
]
NAMES = [*overlays.OVERLAYS, *overlays.OTHERS]


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[server.Server]:
    with server.running(tmp_path_factory.mktemp("api")) as running:
        assert running.kubectl("create", "namespace", "dist-ft").returncode == 0
        yield running


def _for_1_20(doc: dict[str, Any]) -> dict[str, Any]:
    """Puts an object back to what a server of version 1.20 knows."""
    return doc | {"apiVersion": "policy/v1beta1"} if doc["kind"] == "PodDisruptionBudget" else doc


def _pods(docs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every pod as an object that the server checks as it checks pods."""
    found = [t for doc in docs if doc["kind"] in ("RayJob", "RayCluster") for _, t in pod_templates(doc)]
    return [
        {
            "apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": f"pod-{n}", "namespace": "dist-ft"},
            "template": {**template, "spec": {**template["spec"], "restartPolicy": "Always"}},
        }
        for n, template in enumerate(found)
    ]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_server_takes_every_object_and_every_pod(api: server.Server, name: str) -> None:
    docs = [_for_1_20(doc) for doc in overlays.build(name)]
    assert api.dry_run(*docs, *_pods(docs)) == ""


def test_what_a_launcher_may_do(api: server.Server) -> None:
    for doc in overlays.build("common"):
        if doc["kind"] in ("ServiceAccount", "Role", "RoleBinding"):
            assert api.kubectl("apply", "-f", "-", stdin=json.dumps(doc)).returncode == 0

    def may(verb: str, what: str, who: str = "dist-ft-launcher") -> bool:
        answer = api.kubectl(
            "auth", "can-i", verb, what, "--as", f"system:serviceaccount:dist-ft:{who}", "-n", "dist-ft"
        )
        return answer.stdout.strip() == "yes"

    assert all(may(verb, "rayjobs.ray.io") for verb in ("create", "get", "list", "patch", "delete"))
    assert may("get", "pods/log") and may("patch", "configmaps")
    assert not any(may(*ask) for ask in (("get", "secrets"), ("create", "pods/exec"), ("create", "pods"),
                                         ("create", "serviceaccounts"), ("create", "roles.rbac.authorization.k8s.io"),
                                         ("delete", "persistentvolumeclaims")))  # fmt: skip
    assert not may("get", "pods", "dist-ft") and not may("get", "rayjobs.ray.io", "dist-ft-head")


def _wrong_pod(path: list[Any], value: Any) -> dict[str, Any]:
    pod = _pods(overlays.build("gpu"))[2]
    node: Any = pod["template"]["spec"]
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    return pod


def _wrong(kind: str, overlay: str, path: list[Any], value: Any) -> dict[str, Any]:
    doc = _for_1_20(overlays.find(overlays.build(overlay), kind))
    node: Any = doc
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    return doc


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: _wrong_pod(["containers", 0, "volumeMounts", 0, "name"], "nope"), "volumeMounts[0].name: Not found"),
        (lambda: _wrong_pod(["containers", 0, "resources", "requests", "nvidia.com/gpu"], 4), "must be equal to"),
        (lambda: _wrong_pod(["containers", 0, "env", 0], {"name": "A", "valueFrom": {"secretKeyRef": {"name": "s"}}}),
         'missing required field "key"'),
        (lambda: _wrong_pod(["volumes", 1, "name"], "tmp"), "Duplicate value"),
        (lambda: _wrong("PersistentVolumeClaim", "common", ["spec", "accessModes"], ["RWX"]), "Unsupported value"),
        (lambda: _wrong("PersistentVolumeClaim", "common", ["spec", "resources", "requests", "storage"], "500GBB"),
         "quantities must match"),
        (lambda: _wrong("PodDisruptionBudget", "gpu", ["spec", "maxUnavailable"], 0), "cannot be both set"),
        (lambda: _wrong("NetworkPolicy", "gpu", ["spec", "ingress", 1, "ports", 0, "protocol"], "tcp"), "protocol"),
        (lambda: _wrong("RayJob", "gpu", ["metadata", "name"], "Bad_Name"), "Bad_Name"),
        (lambda: _wrong("RayJob", "gpu", ["metadata", "labels", "dist-ft/run"], "no label"), "labels"),
        (lambda: _wrong("RayJob", "gpu", ["spec", "backofLimit"], 3), "unknown field"),
        (lambda: _wrong("RayJob", "gpu", ["spec", "backoffLimit"], "three"), "backoffLimit"),
    ],
    ids=range(12),
)  # fmt: skip
def test_the_server_refuses(api: server.Server, make: Any, words: str) -> None:
    said = api.dry_run(make())
    assert words in said, said
