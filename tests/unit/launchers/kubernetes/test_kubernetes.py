"""What is asked of kubectl, and what follows from its answers; `tests/k8s` checks the manifests themselves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dist_ft.errors import ConfigError, DistFtError, UsageError
from dist_ft.launchers.kubernetes.job import KubernetesLauncher
from dist_ft.launchers.kubernetes.manifests import pod_templates
from dist_ft.launchers.launcher import SubmitRequest
from tests.helpers.fake_kubectl import FakeKubectl
from tests.k8s import overlays

OVERLAY = overlays.KUBERAY / "overlays" / "smoke-cpu"
IMAGE = "here/dist-ft:1"
LAUNCHER = KubernetesLauncher(OVERLAY, image=IMAGE)
needs_kubectl = pytest.mark.skipif(not overlays.is_kubectl_there(), reason=overlays.WHY_ABSENT)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeKubectl:
    folder = tmp_path / "bin"
    folder.mkdir()
    return FakeKubectl(folder, monkeypatch)


@pytest.fixture
def built() -> tuple[list[str], str, int]:
    """The answer of `kubectl kustomize` for the smoke overlay, by the real one."""
    return (["kustomize"], overlays.text("smoke-cpu"), 0)


def _request(tmp_path: Path, *overrides: str, **flags: bool) -> SubmitRequest:
    path = tmp_path / "try.yaml"
    path.write_text("model: {name: tiny-random}\ndata: {train: [{source: 'embedded:orders/train'}]}\n")
    return SubmitRequest(path, overrides, **flags)


def _job(state: str, name: str = "try-1", **status: Any) -> dict[str, Any]:
    return {"metadata": {"name": name}, "spec": {}, "status": {"jobDeploymentStatus": state, **status}}


NONE: tuple[list[str], Any, int] = (["get", "rayjobs"], {"items": []}, 0)


@needs_kubectl
def test_a_run_is_applied_for_good_only_after_the_servers_dry_run(
    tmp_path: Path, fake: FakeKubectl, built: Any
) -> None:
    fake.answer([built, NONE])
    LAUNCHER.submit(_request(tmp_path))
    applies = [call for call in fake.calls if call[0] == "apply"]
    assert ["--dry-run=server" in call for call in applies] == [True, False]
    assert all("--server-side" in call for call in applies)
    assert {item["kind"] for item in fake.applied} == {"RayJob", "ConfigMap", "PodDisruptionBudget", "NetworkPolicy"}


@needs_kubectl
def test_no_secret_of_the_environment_reaches_a_manifest_or_a_command_line(
    tmp_path: Path, fake: FakeKubectl, built: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "HF_TOKEN", "RAY_AUTH_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, f"planted-{name}")
    fake.answer([built, NONE])
    LAUNCHER.submit(_request(tmp_path))
    assert "WANDB_API_KEY" in str(fake.applied), "the name of the secret is there"
    assert "planted-" not in str(fake.applied) + str(fake.calls)


@needs_kubectl
def test_what_the_server_refuses_is_not_applied(tmp_path: Path, fake: FakeKubectl, built: Any) -> None:
    fake.answer([built, NONE, (["--dry-run=server"], "rayjobs.ray.io is forbidden", 1)])
    with pytest.raises(DistFtError, match="forbidden"):
        LAUNCHER.submit(_request(tmp_path))
    assert fake.applied == []


@needs_kubectl
@pytest.mark.parametrize("state", ["", "Initializing", "Running", "Suspended", "Retrying"])
def test_a_run_that_is_at_work_is_not_started_twice(tmp_path: Path, fake: FakeKubectl, built: Any, state: str) -> None:
    fake.answer([built, (["get", "rayjobs"], {"items": [_job("Failed"), _job(state, "try-2")]}, 0)])
    with pytest.raises(UsageError, match="at work as RayJob try-2"):
        LAUNCHER.submit(_request(tmp_path, resume=True))
    assert fake.applied == []


@needs_kubectl
def test_a_run_that_has_ended_goes_on_only_when_asked_to(tmp_path: Path, fake: FakeKubectl, built: Any) -> None:
    ended = (["get", "rayjobs"], {"items": [_job("Failed")]}, 0)
    fake.answer([built, ended])
    with pytest.raises(UsageError, match="--resume"):
        LAUNCHER.submit(_request(tmp_path))
    fake.answer([built, ended])
    LAUNCHER.submit(_request(tmp_path, resume=True))
    assert "--resume" in next(item for item in fake.applied if item["kind"] == "RayJob")["spec"]["entrypoint"]


@needs_kubectl
@pytest.mark.parametrize("preflight", [True, False])
def test_the_nodes_are_looked_at_first_unless_told_not_to(
    tmp_path: Path, fake: FakeKubectl, built: Any, preflight: bool
) -> None:
    fake.answer([built, NONE])
    LAUNCHER.submit(replace(_request(tmp_path), preflight=preflight))
    job = next(item for item in fake.applied if item["kind"] == "RayJob")
    assert ("--preflight" in job["spec"]["entrypoint"].split()) is preflight


@needs_kubectl
def test_each_submission_has_a_name_of_its_own(tmp_path: Path, fake: FakeKubectl, built: Any) -> None:
    fake.answer([built, NONE, built, NONE])
    LAUNCHER.submit(_request(tmp_path))
    LAUNCHER.submit(_request(tmp_path))
    names = [item["metadata"]["name"] for item in fake.applied if item["kind"] == "RayJob"]
    assert len(set(names)) == 2 and all(name.startswith("try-") for name in names)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [(["optimiser.lr=1"], "unknown key"), (["train.micro_batch_size=64"], "micro_batch_size")],
)
def test_a_bad_config_never_reaches_kubectl(
    tmp_path: Path, fake: FakeKubectl, overrides: list[str], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        KubernetesLauncher(OVERLAY).submit(_request(tmp_path, *overrides))
    assert fake.calls == []


@needs_kubectl
def test_an_overlay_with_a_fault_is_refused_before_the_cluster_is_asked(
    tmp_path: Path, fake: FakeKubectl, built: Any
) -> None:
    fake.answer([(built[0], built[1].replace('num-cpus: "0"', 'num-cpus: "8"'), 0)])
    with pytest.raises(ConfigError, match="num-cpus='8'"):
        LAUNCHER.submit(_request(tmp_path))
    assert [call[0] for call in fake.calls] == ["kustomize"]


@needs_kubectl
@pytest.mark.parametrize("overlay", ["s3", "smoke-cpu"])
def test_a_run_in_a_bucket_is_submitted_with_and_without_a_volume(
    tmp_path: Path, fake: FakeKubectl, overlay: str
) -> None:
    fake.answer([(["kustomize"], overlays.text(overlay), 0), NONE])
    request = _request(tmp_path, "run.output_dir=s3://b/runs", "cluster.resources_per_worker={CPU: 1}")
    submitted = KubernetesLauncher(overlays.KUBERAY / "overlays" / overlay, image=IMAGE).submit(request)
    assert submitted.run_dir == "s3://b/runs/try"
    job = next(item for item in fake.applied if item["kind"] == "RayJob")
    assert job["metadata"]["annotations"]["dist-ft/run-dir"] == "s3://b/runs/try"
    assert ["dist-ft", "stop", "s3://b/runs/try", "--timeout", "120"] in [
        container["lifecycle"]["preStop"]["exec"]["command"]
        for _, template in pod_templates(job)
        for container in template["spec"]["containers"]
        if "lifecycle" in container
    ]


@needs_kubectl
def test_a_run_on_a_path_is_refused_by_an_overlay_without_a_volume(tmp_path: Path, fake: FakeKubectl) -> None:
    fake.answer([(["kustomize"], overlays.text("s3"), 0)])
    with pytest.raises(ConfigError, match=r"run\.output_dir=runs: .*no persistentVolumeClaim"):
        KubernetesLauncher(overlays.KUBERAY / "overlays" / "s3", image=IMAGE).submit(_request(tmp_path))
    assert [call[0] for call in fake.calls] == ["kustomize"]


@needs_kubectl
def test_the_example_image_is_refused(tmp_path: Path, fake: FakeKubectl, built: Any) -> None:
    fake.answer([built])
    with pytest.raises(ConfigError, match="is an example; build docker/Dockerfile"):
        KubernetesLauncher(OVERLAY).submit(_request(tmp_path))


def test_a_folder_that_is_no_overlay_is_refused(tmp_path: Path, fake: FakeKubectl) -> None:
    with pytest.raises(UsageError, match=r"no kustomization\.yaml"):
        KubernetesLauncher(tmp_path).submit(_request(tmp_path))


def test_without_kubectl_there_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="kubectl is not on PATH"):
        LAUNCHER.submit(_request(tmp_path))
