"""`make launch-tests`: what `submit` would apply, without an operator: a host a pod, with the manifest's variables, Ray
parameters, volumes and commands. Shows that manifest, command line and config fit together; the operator is not in it.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster.local.hosts import Hosts, why_not
from dist_ft.config import load_config
from dist_ft.launchers.kubernetes.manifests import Manifest, pod_templates
from dist_ft.launchers.kubernetes.submit import render
from dist_ft.launchers.launcher import SubmitRequest
from tests.k8s import overlays

_REASON = why_not() or (None if overlays.is_kubectl_there() else overlays.WHY_ABSENT)
pytestmark = [
    pytest.mark.minikuberay,
    pytest.mark.skipif(_REASON is not None, reason=str(_REASON)),
    pytest.mark.timeout(900),
]
_START_LIMIT_S = 300.0
_RUN_LIMIT_S = 400.0


class Pods(Hosts):
    """Hosts that are the pods of a RayJob: number 1 its head, the others its workers."""

    def __init__(self, folder: Path, manifests: Sequence[Manifest]) -> None:
        super().__init__(folder)
        self._job = next(m for m in manifests if m["kind"] == "RayJob")
        self._config = next(m for m in manifests if m["kind"] == "ConfigMap")["data"]["config.yaml"]
        self._cluster = self._job["spec"]["rayClusterSpec"]
        self._pods = dict(pod_templates(self._job))

    def start(self) -> None:
        """Boots all pods; a RayCluster is ready when all are."""
        self.up(1 + sum(group["replicas"] for group in self._cluster["workerGroupSpecs"]))

    def run(self, command: str) -> subprocess.Popen[bytes]:
        """Runs a command in the head's container, by a shell as Ray does; the config is at /mnt/config there."""
        words = self.command(1, ["sh", "-c", command.replace("/config/", "/mnt/config/")])
        return subprocess.Popen(words, env=self._environment_of(1), cwd="/")

    @property
    def entrypoint(self) -> str:
        """The driver's command."""
        return str(self._job["spec"]["entrypoint"])

    @property
    def pre_stop(self) -> str:
        """What the head does before it ends."""
        hook: list[str] = self._container(1)["lifecycle"]["preStop"]["exec"]["command"]
        return shlex.join(hook)

    def _group(self, host: int) -> tuple[str, Manifest]:
        if host == 1:
            return "head", self._cluster["headGroupSpec"]
        group = self._cluster["workerGroupSpecs"][0]
        return f"worker group {group['groupName']}", group

    def _container(self, host: int) -> Manifest:
        container: Manifest = self._pods[self._group(host)[0]]["spec"]["containers"][0]
        return container

    def _environment_of(self, host: int) -> dict[str, str]:
        plain = {v["name"]: v["value"] for v in self._container(host)["env"] if "value" in v}
        return self.environment() | plain

    def _boot(self, host: int) -> None:
        super()._boot(host)
        volumes = self._pods[self._group(host)[0]]["spec"]["volumes"]
        shm = next(v["emptyDir"]["sizeLimit"] for v in volumes if v["name"] == "shm")
        (self.shared_dir / "config").mkdir(exist_ok=True)
        (self.shared_dir / "config" / "config.yaml").write_text(self._config)
        script = f"""mount -o remount,size={shm.removesuffix("i")} /dev/shm && mount -t tmpfs tmpfs /mnt &&
            mkdir /mnt/dist-ft /mnt/config && mount --bind {self.shared_dir} /mnt/dist-ft &&
            mount --bind {self.shared_dir}/config /mnt/config"""
        subprocess.run(self.command(host, ["sh", "-c", script]), check=True)

    def _start_ray(self, hosts: Sequence[int]) -> None:
        """As the operator does: the group's parameters, and CPUs from the container's limits."""
        logs = {host: self._dir / f"ray-{host}.log" for host in hosts}
        for host, path in logs.items():
            parameters = {"num-cpus": str(self._container(host)["resources"]["limits"]["cpu"])}
            parameters |= self._group(host)[1]["rayStartParams"]
            where = (
                ["--head", "--port=6379", "--include-dashboard=false"] if host == 1 else [f"--address={self.address}"]
            )
            words = [str(self._bin_dir / "ray"), "start", "--block", *where, f"--node-ip-address={self.ip(host)}"]
            words += [f"--{name}={value}" for name, value in parameters.items()]
            with path.open("wb") as log:
                subprocess.Popen(
                    self.command(host, words), env=self._environment_of(host), stdin=subprocess.DEVNULL, stdout=log,
                    stderr=log, start_new_session=True,
                )  # fmt: skip
        deadline = time.monotonic() + _START_LIMIT_S
        for path in logs.values():
            while b"Ray runtime started" not in path.read_bytes():
                assert time.monotonic() < deadline, path.read_text()[-2000:]
                time.sleep(0.2)


@pytest.fixture
def pods(tmp_path: Path) -> Iterator[Pods]:
    request = SubmitRequest(overlays.KUBERAY / "base" / "config.yaml", ("train.max_steps=200", "optimizer.lr=1e-3",
                                                                        "checkpoint.every_steps=5"))  # fmt: skip
    manifests = render(
        request, overlays.KUBERAY / "overlays" / "smoke-cpu", suffix="test", image="here/dist-ft:1"
    ).manifests
    (tmp_path / "config.yaml").write_text(next(m for m in manifests if m["kind"] == "ConfigMap")["data"]["config.yaml"])
    made = Pods(tmp_path / "pods", manifests)
    try:
        made.start()
        yield made
    finally:
        made.down()


def test_a_run_of_the_manifest_stops_when_the_head_is_told_to_go_and_a_retry_completes_it(
    pods: Pods, tmp_path: Path
) -> None:
    config = load_config(tmp_path / "config.yaml")
    run_dir = pods.shared_dir / Path(config.run.output_dir).relative_to("/mnt/dist-ft") / config.run.name
    first = pods.run(pods.entrypoint)
    deadline = time.monotonic() + _RUN_LIMIT_S
    while not list(run_dir.glob("checkpoints/*/manifest.json")):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    assert pods.run(pods.pre_stop).wait(150) == 0
    assert first.wait(60) == 3
    stopped_at = _record(run_dir)["step"]
    assert 5 <= stopped_at < 200 and _record(run_dir)["state"] == "stopped"
    assert pods.run(pods.entrypoint).wait(_RUN_LIMIT_S) == 0
    record = _record(run_dir)
    assert (record["state"], record["step"]) == ("completed", 200)
    assert (run_dir / "exports" / "final" / "model.safetensors").is_file()
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 201))  # no step was lost to the stop


def _record(run_dir: Path) -> dict[str, Any]:
    return dict(json.loads((run_dir / "run.json").read_text()))
