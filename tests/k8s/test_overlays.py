"""Every overlay: what the API server, the operator and we ask of it."""

from __future__ import annotations

import importlib
import shlex
from pathlib import Path

import pytest
import typer
import yaml
from ray import serve
from ray.serve.schema import ServeDeploySchema

from dist_ft.cli.app import app
from dist_ft.config import load_config
from dist_ft.config.rules import check_sections
from dist_ft.errors import UsageError
from dist_ft.launchers.kubernetes.lint import problems_of, size_bytes
from dist_ft.launchers.kubernetes.manifests import cluster_of, pod_templates, shared_mount
from dist_ft.launchers.kubernetes.pod_paths import on_volume
from dist_ft.service import DATABASE_ENV
from dist_ft.service.api_keys import add_key
from dist_ft.service.api_server import Settings, open_index
from dist_ft.service.tuning.catalogue import read_catalogue
from dist_ft.service.tuning.job_plan import check_extensions
from dist_ft.service.tuning.job_request import read_request
from tests.helpers.paths import ROOT
from tests.k8s import crd, overlays

pytestmark = pytest.mark.skipif(not overlays.is_kubectl_there(), reason=overlays.WHY_ABSENT)


@pytest.mark.parametrize("name", [*overlays.OVERLAYS, "serve", "shared"])
@pytest.mark.skipif(not crd.are_there(), reason=crd.WHY_ABSENT)
def test_what_is_built_fits_the_schema_of_kuberay(name: str) -> None:
    assert [problem for doc in overlays.build(name) for problem in crd.schema_problems(doc)] == []


@pytest.mark.parametrize("name", [*overlays.OVERLAYS, *overlays.OTHERS])
def test_what_is_built_passes_the_operators_rules_and_ours(name: str) -> None:
    assert problems_of(overlays.build(name)) == []


@pytest.mark.parametrize("name", overlays.OVERLAYS)
def test_entrypoint_and_pre_stop_parse_as_commands_and_mean_the_config_in_the_config_map(
    name: str, tmp_path: Path
) -> None:
    docs = overlays.build(name)
    job = overlays.find(docs, "RayJob")
    shell, program, verb, *arguments = shlex.split(job["spec"]["entrypoint"])
    assert (shell, program) == ("exec", "dist-ft")
    parsed = _parse(verb, arguments)
    assert (parsed["config"], parsed["address"], parsed["resume"]) == (Path("/config/config.yaml"), "auto", True)
    path = tmp_path / "config.yaml"
    path.write_text(overlays.find(docs, "ConfigMap")["data"]["config.yaml"])
    config = load_config(path)
    check_sections(config)
    assert on_volume(config, shared_mount(job)) == config, "pods find all that it names"
    hook = dict(pod_templates(job))["head"]["spec"]["containers"][0].get("lifecycle")
    if hook is not None:
        program, verb, *arguments = hook["preStop"]["exec"]["command"]
        assert (program, _parse(verb, arguments)["run"]) == ("dist-ft", config.run.address)


def _parse(verb: str, arguments: list[str]) -> dict[str, object]:
    command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    return dict(command.make_context(verb, arguments).params)


@pytest.mark.parametrize("name", [*overlays.OVERLAYS, "serve", "shared"])
def test_ray_is_the_version_that_is_pinned(name: str) -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    docs = overlays.build(name)
    clusters = [cluster_of(doc) for doc in docs if doc["kind"] in ("RayCluster", "RayJob", "RayService")]
    assert [cluster["rayVersion"] for cluster in clusters] == [pins["ray"]]


@pytest.mark.parametrize("name", overlays.OVERLAYS)
def test_all_pods_but_the_submitter_see_the_volume_at_one_place(name: str) -> None:
    job = overlays.find(overlays.build(name), "RayJob")
    mounts = {
        where: [m["mountPath"] for m in pod["spec"]["containers"][0]["volumeMounts"] if m["name"] == "shared"]
        for where, pod in pod_templates(job)
        if where != "submitter"
    }
    mount = shared_mount(job)
    assert set(map(tuple, mounts.values())) == {() if mount is None else (mount,)}
    assert (mount is None) == (name == "s3")


def test_runs_in_an_object_store_have_room_for_shards_and_models_and_keys_by_the_name_of_a_secret_alone() -> None:
    docs = overlays.build("s3")
    config = yaml.safe_load(overlays.find(docs, "ConfigMap")["data"]["config.yaml"])
    assert "persistentVolumeClaim" not in str(docs) and "/mnt/dist-ft" not in str(docs)
    for where, template in pod_templates(overlays.find(docs, "RayJob")):
        pod = template["spec"]
        variables = {variable["name"]: variable for variable in pod["containers"][0]["env"]}
        if where == "submitter":
            assert not [name for name in variables if name.startswith("AWS_")]
            continue
        keys = [
            variables[f"AWS_{name}"]["valueFrom"]["secretKeyRef"] for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY")
        ]
        assert [(key["name"], key["optional"]) for key in keys] == [("dist-ft-s3", True)] * 2
        assert all("value" in variables[f"AWS_{name}"] for name in ("ENDPOINT_URL_S3", "DEFAULT_REGION"))
        tmp = next(volume for volume in pod["volumes"] if volume["name"] == "tmp")["emptyDir"]
        assert {"name": "tmp", "mountPath": "/tmp"} in pod["containers"][0]["volumeMounts"]
        for place in (variables["HF_HOME"]["value"], config["data"]["loader"]["cache_dir"]):
            assert Path(place).is_relative_to("/tmp")
        if where.startswith("worker"):
            assert size_bytes(tmp["sizeLimit"]) > 2 * config["data"]["loader"]["cache_gib"] * 2**30
            assert pod["containers"][0]["resources"]["requests"]["ephemeral-storage"] == tmp["sizeLimit"]


def test_launchers_may_not_read_secrets_nor_run_commands_in_pods() -> None:
    role = overlays.find(overlays.build("common"), "Role")
    granted = {(resource, verb) for rule in role["rules"] for resource in rule["resources"] for verb in rule["verbs"]}
    assert ("rayjobs", "create") in granted and ("pods/log", "get") in granted
    assert not {resource for resource, _ in granted} & {"secrets", "pods/exec", "*", "serviceaccounts", "roles"}
    assert "*" not in {verb for _, verb in granted}


def test_the_service_is_one_pod_whose_store_all_see_and_whose_index_is_its_own() -> None:
    docs = overlays.build("service")
    spec = overlays.find(docs, "Deployment")["spec"]
    assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"}), "the index is a file"
    container = spec["template"]["spec"]["containers"][0]
    program, verb, *arguments = container["command"]
    parsed = _parse(verb, arguments)
    shared = overlays.find(overlays.build("shared"), "RayCluster")
    head = shared["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    claims = {
        v["name"]: v.get("persistentVolumeClaim", {}).get("claimName") for v in spec["template"]["spec"]["volumes"]
    }
    assert program == "dist-ft" and {"name": "shared", "mountPath": "/mnt/dist-ft"} in head["volumeMounts"]
    assert (claims[mounts["/mnt/dist-ft"]], Path(str(parsed["store"])).parent) == ("dist-ft", Path("/mnt/dist-ft"))
    own = [doc["metadata"]["name"] for doc in docs if doc["kind"] == "PersistentVolumeClaim"]
    variables = {variable["name"]: variable for variable in container["env"]}
    assert own == [claims[mounts["/index"]]]
    assert variables[DATABASE_ENV]["value"] == "sqlite:////index/index.sqlite"
    assert parsed["admin_key_file"] == Path("/run/secrets/dist-ft-service/admin-key")
    token = variables["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]
    assert (token["name"], parsed["address"]) == (
        shared["metadata"]["name"], f"http://{shared['metadata']['name']}-head-svc:8265",
    )  # fmt: skip
    assert container["image"] == head["image"]


def test_the_ray_service_answers_for_the_store_of_the_service(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    service = overlays.find(overlays.build("serve"), "RayService")
    config = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    (application,) = config.applications
    module, _, function = application.import_path.partition(":")
    build = getattr(importlib.import_module(module), function)
    container = overlays.find(overlays.build("service"), "Deployment")["spec"]["template"]["spec"]["containers"][0]
    assert f"--store={application.args['store']}" in container["command"]
    for where, pod in pod_templates(service):
        variables = {variable["name"]: variable for variable in pod["spec"]["containers"][0]["env"]}
        assert "secretKeyRef" in variables[DATABASE_ENV]["valueFrom"], where
    monkeypatch.setenv(DATABASE_ENV, f"sqlite:///{tmp_path / 'index.sqlite'}")
    arguments = {**application.args, "store": str(tmp_path)}
    with pytest.raises(UsageError, match="has no key"):  # pods of others reach it
        build(arguments)
    index = open_index(Settings(str(tmp_path), f"sqlite:///{tmp_path / 'index.sqlite'}"))
    add_key(index, "member", "default", "test", None)
    index.close()
    assert isinstance(build(arguments), serve.Application)


def test_the_catalogue_of_the_service_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "catalogue.yaml"
    path.write_text(overlays.find(overlays.build("service"), "ConfigMap")["data"]["catalogue.yaml"])
    for base in read_catalogue(path).values():
        check_extensions(base, read_request({"model": base.name, "training_file": "file-x"}))  # makes a run's config


def test_the_shared_cluster_lets_the_service_at_its_dashboard_and_at_nothing_else() -> None:
    labels = overlays.find(overlays.build("service"), "Deployment")["spec"]["template"]["metadata"]["labels"]
    rules = overlays.find(overlays.build("shared"), "NetworkPolicy")["spec"]["ingress"]
    admitted = [
        rule.get("ports")
        for rule in rules
        for peer in rule["from"]
        if "namespaceSelector" not in peer and peer["podSelector"]["matchLabels"].items() <= labels.items()
    ]
    assert admitted == [[{"protocol": "TCP", "port": 8265}]]


def test_no_object_is_a_secret() -> None:
    everything = [doc for name in [*overlays.OVERLAYS, *overlays.OTHERS] for doc in overlays.build(name)]
    assert [doc["metadata"]["name"] for doc in everything if doc["kind"] == "Secret"] == []


@pytest.mark.parametrize("path", sorted(overlays.KUBERAY.rglob("*.yaml")), ids=lambda path: "/".join(path.parts[-2:]))
def test_every_file_opens_with_what_it_is_for(path: Path) -> None:
    lines = path.read_text().splitlines()
    opening = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    assert opening, path
    is_patch = lines[len(opening)].startswith("- op:")
    assert is_patch or any("o change" in line for line in opening), f"{path} does not say what to change"
