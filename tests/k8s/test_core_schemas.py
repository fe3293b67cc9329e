"""Objects of Kubernetes itself, and every pod, against Kubernetes' own schemas.

Needs `pip install kubernetes-validate` (108 MB), so not part of the usual set-up; skipped where it is not installed.
"""

from __future__ import annotations

from typing import Any

import pytest

from dist_ft.launchers.kubernetes.manifests import pod_templates
from tests.k8s import overlays

kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
pytestmark = pytest.mark.skipif(not overlays.is_kubectl_there(), reason=overlays.WHY_ABSENT)
_OTHERS = ("RayJob", "RayCluster")
_VERSION = "1.34"


def _objects(name: str) -> list[dict[str, Any]]:
    docs = overlays.build(name)
    pods = [
        {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": template}
        for doc in docs
        if doc["kind"] in _OTHERS
        for _, template in pod_templates(doc)
    ]
    return [doc for doc in docs if doc["kind"] not in _OTHERS] + pods


@pytest.mark.parametrize("name", [*overlays.OVERLAYS, *overlays.OTHERS])
def test_objects_and_pods_fit_the_schemas_of_kubernetes(name: str) -> None:
    for document in _objects(name):
        kubernetes_validate.validate(document, _VERSION, strict=True)


def test_a_typo_in_a_core_object_is_refused() -> None:
    policy = overlays.find(overlays.build("gpu"), "NetworkPolicy")
    policy["spec"]["podSelectors"] = policy["spec"].pop("podSelector")
    with pytest.raises(kubernetes_validate.ValidationError, match="podSelectors"):
        kubernetes_validate.validate(policy, _VERSION, strict=True)
