"""Checks RayJob, RayCluster and RayService as the API server would, from KubeRay's CRDs alone.

The CRDs are not part of this project. They are looked for in $DIST_FT_CRDS, then in ../shared/data/crds beside the
repository; tests that need them skip where they are absent.
"""

from __future__ import annotations

import functools
import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator, ValidationError, validators

from tests.helpers.paths import ROOT

CRDS = Path(os.environ.get("DIST_FT_CRDS") or ROOT.parent / "shared" / "data" / "crds")
WHY_ABSENT = f"the KubeRay CRDs are not at {CRDS}; set DIST_FT_CRDS to a folder with ray.io_rayjobs.json.gz"
_SERVICES = "ray.io_rayservices.json.gz"
_FILES = {"RayJob": "ray.io_rayjobs.json.gz", "RayCluster": "ray.io_rayclusters.json.gz"}


def are_there() -> bool:
    """Whether the CRDs are on this machine."""
    return all((CRDS / name).is_file() for name in _FILES.values())


def schema_problems(manifest: dict[str, Any]) -> list[str]:
    """Returns what the schema refuses, each with its path; nothing for kinds that are not KubeRay's."""
    if manifest.get("kind") == "RayService" and not (CRDS / _SERVICES).is_file():
        # Without its CRD the cluster in it still is checked.
        manifest = {**manifest, "kind": "RayCluster", "spec": manifest["spec"]["rayClusterConfig"]}
    if manifest.get("kind") not in {*_FILES, "RayService"}:
        return []
    errors = _validator(manifest["kind"]).iter_errors(manifest)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message[:300]}" for error in errors]


@functools.cache
def _validator(kind: str) -> Any:
    crd = json.loads(gzip.decompress((CRDS / _FILES.get(kind, _SERVICES)).read_bytes()))
    schema = next(v["schema"]["openAPIV3Schema"] for v in crd["spec"]["versions"] if v["name"] == "v1")
    closed = _closed(schema)
    closed["properties"]["metadata"] = {"type": "object", "required": ["name"]}
    return validators.extend(Draft202012Validator, {"x-unique-by": _unique_by})(closed)


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    """Returns the JSON schema: unknown keys refused, and what the server fills in itself not required."""
    found = {
        key: value for key, value in schema.items() if not key.startswith("x-") and key not in ("default", "format")
    }
    if schema.get("x-kubernetes-int-or-string"):
        found["type"] = ["integer", "string"]
    if "properties" in schema:
        found["properties"] = {name: _closed(value) for name, value in schema["properties"].items()}
        defaulted = {name for name, value in schema["properties"].items() if "default" in value}
        found["required"] = [name for name in schema.get("required", []) if name not in defaulted]
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            found.setdefault("additionalProperties", False)
    if isinstance(schema.get("items"), dict):
        found["items"] = _closed(schema["items"])
    if isinstance(schema.get("additionalProperties"), dict):
        found["additionalProperties"] = _closed(schema["additionalProperties"])
    if schema.get("x-kubernetes-list-type") == "map":
        defaults = {name: value.get("default") for name, value in schema["items"]["properties"].items()}
        found["x-unique-by"] = [(key, defaults[key]) for key in schema["x-kubernetes-list-map-keys"]]
    return found


def _unique_by(_: Any, keys: list[tuple[str, Any]], items: list[Any], __: Any) -> Iterator[ValidationError]:
    seen = set()
    for item in items:
        identity = tuple(item.get(key, default) for key, default in keys)
        if identity in seen:
            yield ValidationError(f"{identity} stands twice")
        seen.add(identity)
