"""From config and overlay to the manifests of one run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dist_ft.config import Config, load_config
from dist_ft.errors import ConfigError, UsageError
from dist_ft.launchers.kubernetes.manifests import cores, for_run, shared_mount, slots, slug
from dist_ft.launchers.kubernetes.pod_paths import on_volume
from tests.helpers.paths import ROOT

BASE = ROOT / "cluster" / "kuberay" / "base"
MOUNT = "/mnt/dist-ft"


def _config(tmp_path: Path, *overrides: str) -> Config:
    path = tmp_path / "My_Run.yaml"
    path.write_text("model: {name: tiny-random}\ndata: {train: [{source: chats.jsonl}]}\n")
    return load_config(path, overrides)


def _overlay() -> list[dict[str, Any]]:
    """The base as its files are, without kustomize: its objects labelled, and a ConfigMap."""
    names = ("rayjob.yaml", "pdb.yaml", "networkpolicy.yaml")
    docs = [yaml.safe_load((BASE / name).read_text()) for name in names]
    docs.append({"kind": "ConfigMap", "metadata": {"name": "dist-ft-config"}, "data": {}})
    for doc in docs:
        doc["metadata"].setdefault("labels", {})["dist-ft/run"] = "example"
    return [*docs, {"kind": "PersistentVolumeClaim", "metadata": {"name": "dist-ft"}}]


def _without_volume() -> list[dict[str, Any]]:
    docs = _overlay()
    pod = docs[0]["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    pod["volumes"] = [volume for volume in pod["volumes"] if volume["name"] != "shared"]
    mounts = pod["containers"][0]["volumeMounts"]
    pod["containers"][0]["volumeMounts"] = [mount for mount in mounts if mount["name"] != "shared"]
    return docs


def _run(tmp_path: Path, *overrides: str, docs: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    config = on_volume(_config(tmp_path, *overrides), MOUNT)
    return for_run(docs or _overlay(), config, suffix="abcde", namespace="team")


@given(st.from_regex(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z"))
def test_a_slug_is_a_name_that_kubernetes_takes(name: str) -> None:
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", slug(name)) and len(slug(name)) <= 40


def test_names_that_differ_have_slugs_that_differ() -> None:
    names = ["run", "Run", "r.un", "r-un", "r_un", "1run", "x" * 40, "x" * 41, "x" * 42, "..."]
    assert len({slug(name) for name in names}) == len(names) and slug("run") == "run"


IN_A_STORE = ("run.output_dir=s3://b/runs/", "data.train=[{source: 's3://b/a.jsonl'}]")


@pytest.mark.parametrize("mount", [MOUNT, None])
def test_a_run_in_an_object_store_is_known_by_its_url_and_stopped_by_it(tmp_path: Path, mount: str | None) -> None:
    docs = _overlay() if mount else _without_volume()
    assert shared_mount(docs[0]) == mount
    job = for_run(docs, on_volume(_config(tmp_path, *IN_A_STORE), mount), suffix="a", namespace="n")[0]
    assert job["metadata"]["annotations"] == {"dist-ft/run-dir": "s3://b/runs/My_Run"}
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert head["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1:3] == ["stop", "s3://b/runs/My_Run"]


def test_everything_of_a_run_carries_its_name_and_nothing_else_is_taken_along(tmp_path: Path) -> None:
    docs = _run(tmp_path)
    run = slug("My_Run")
    assert {doc["kind"]: doc["metadata"]["name"] for doc in docs} == {
        "RayJob": f"{run}-abcde",
        "ConfigMap": f"dist-ft-config-{run}",
        "PodDisruptionBudget": f"dist-ft-head-{run}",
        "NetworkPolicy": f"dist-ft-run-{run}",
    }
    assert {doc["metadata"]["namespace"] for doc in docs} == {"team"}
    assert "example" not in re.findall(r"dist-ft/run: (\S+)", yaml.safe_dump(docs))


def test_the_config_map_holds_the_whole_config_and_the_head_mounts_it(tmp_path: Path) -> None:
    docs = _run(tmp_path, "optimizer.lr=3e-5")
    written = next(doc for doc in docs if doc["kind"] == "ConfigMap")
    path = tmp_path / "written.yaml"
    path.write_text(written["data"]["config.yaml"])
    assert load_config(path) == on_volume(_config(tmp_path, "optimizer.lr=3e-5"), MOUNT)
    head = docs[0]["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert {"name": written["metadata"]["name"]} in [volume.get("configMap") for volume in head["volumes"]]
    assert head["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][2] == "/mnt/dist-ft/runs/My_Run"


def test_the_config_map_leaves_to_an_adapter_what_the_user_did(tmp_path: Path) -> None:
    config = on_volume(_config(tmp_path, "method.init_from=adapters/a", "method.lora_dropout=0.1"), MOUNT)
    written = next(d for d in for_run(_overlay(), config, suffix="a", namespace="n") if d["kind"] == "ConfigMap")
    method = yaml.safe_load(written["data"]["config.yaml"])["method"]
    assert method == {"init_from": "/mnt/dist-ft/adapters/a", "lora_dropout": 0.1}


def test_the_overlay_is_left_as_it_was(tmp_path: Path) -> None:
    docs = _overlay()
    _run(tmp_path, docs=docs)
    assert docs == _overlay()


def test_an_image_replaces_that_of_every_pod(tmp_path: Path) -> None:
    config = on_volume(_config(tmp_path), MOUNT)
    job = for_run(_overlay(), config, suffix="a", namespace="n", image="here/it:1")[0]
    assert re.findall(r"image: (\S+)", yaml.safe_dump(job)) == ["here/it:1"] * 3


GPU = {"resources": {"limits": {"nvidia.com/gpu": 8, "cpu": "32"}}}
CPU = {"resources": {"limits": {"cpu": "3500m"}}}


@pytest.mark.parametrize(
    ("container", "overrides", "expected"),
    [
        (GPU, [], 8),
        (GPU, ["cluster.resources_per_worker={GPU: 2}"], 4),
        (GPU, ["cluster.resources_per_worker={GPU: 1, CPU: 8}"], 4),
        (CPU, [], 3),
        (CPU, ["cluster.resources_per_worker={CPU: 2}"], 1),
        (CPU, ["cluster.resources_per_worker={GPU: 1}"], 0),
    ],
)
def test_a_pod_holds_as_many_workers_as_its_limits_allow(
    tmp_path: Path, container: dict[str, Any], overrides: list[str], expected: int
) -> None:
    group = {"template": {"spec": {"containers": [container]}}}
    assert slots(group, _config(tmp_path, *overrides)) == expected


@pytest.mark.parametrize(
    ("workers", "is_elastic", "num_groups", "expected"),
    [
        ("5", False, 1, [(3, 3, 3)]),
        ("[2,5]", False, 1, [(3, 3, 3)]),  # nobody would add a pod later
        ("[2,5]", True, 1, [(1, 1, 3)]),
        ("[3,9]", True, 2, [(2, 2, 2), (0, 0, 3)]),
        ("4", True, 2, [(2, 2, 2), (0, 0, 0)]),
    ],
)
def test_pods_are_as_many_as_the_workers_need(
    tmp_path: Path, workers: str, is_elastic: bool, num_groups: int, expected: list[tuple[int, int, int]]
) -> None:
    docs = _overlay()
    cluster = docs[0]["spec"]["rayClusterSpec"]
    cluster["enableInTreeAutoscaling"] = is_elastic
    cluster["workerGroupSpecs"] *= num_groups  # two CPUs, so two workers, a pod
    built = _run(tmp_path, f"cluster.num_workers={workers}", docs=json.loads(json.dumps(docs)))
    groups = built[0]["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert [(g["replicas"], g["minReplicas"], g["maxReplicas"]) for g in groups] == expected


def test_workers_that_no_pod_holds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a worker pod of the overlay holds none"):
        _run(tmp_path, "cluster.resources_per_worker={GPU: 1}")


def test_two_groups_without_an_autoscaler_keep_their_numbers_and_must_hold_the_workers(tmp_path: Path) -> None:
    docs = _overlay()
    docs[0]["spec"]["rayClusterSpec"]["workerGroupSpecs"] *= 2
    with pytest.raises(ConfigError, match="room for 8"):
        _run(tmp_path, "cluster.num_workers=9", docs=json.loads(json.dumps(docs)))


def test_an_overlay_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="0 objects of kind RayJob"):
        _run(tmp_path, docs=[{"kind": "Service", "metadata": {"name": "a"}}])


@pytest.mark.parametrize(("quantity", "expected"), [("500m", 0.5), ("2", 2.0), (4, 4.0), ("1.5", 1.5)])
def test_cpu_quantities(quantity: str | int, expected: float) -> None:
    assert cores(quantity) == expected
