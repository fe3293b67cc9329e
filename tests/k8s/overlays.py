"""The kustomizations of `cluster/kuberay`, built once a session."""

from __future__ import annotations

import functools
import shutil
import subprocess
from typing import Any

import yaml

from tests.helpers.paths import ROOT

KUBERAY = ROOT / "cluster" / "kuberay"
OVERLAYS = sorted(path.parent.name for path in KUBERAY.glob("overlays/*/kustomization.yaml"))
OTHERS = ("common", "redis", "serve", "service", "shared")
WHY_ABSENT = "kubectl is not on PATH; it builds the overlays (`kubectl kustomize`)"


_KUBECTL = shutil.which("kubectl")  # before a test puts another one on PATH


def is_kubectl_there() -> bool:
    """Whether overlays can be built here."""
    return _KUBECTL is not None


@functools.cache
def text(name: str) -> str:
    """Returns what `kubectl kustomize` prints."""
    directory = KUBERAY / name if name in OTHERS else KUBERAY / "overlays" / name
    command = [str(_KUBECTL), "kustomize", str(directory)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def build(name: str) -> list[dict[str, Any]]:
    """Returns the objects of an overlay, or of one of the others; the caller may change them."""
    return list(yaml.safe_load_all(text(name)))


def find(manifests: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """Returns the first object of a kind."""
    return next(manifest for manifest in manifests if manifest["kind"] == kind)
