"""`make image-test`: the images built here, run as a pod runs them; compose.yaml's cluster in network namespaces."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_ft import __version__
from tests.helpers.images import Images, wait_until, why_not
from tests.helpers.paths import ROOT
from tests.helpers.rows import last_rows

_REASON = why_not()
pytestmark = [
    pytest.mark.images,
    pytest.mark.skipif(_REASON is not None, reason=str(_REASON)),
    pytest.mark.timeout(2400),
]
_CONFIGS = f"{ROOT / 'configs'}:/configs:ro"
_RUNS = "/mnt/dist-ft/runs"


@pytest.fixture(scope="module")
def images() -> Iterator[Images]:
    kept = os.environ.get("DIST_FT_IMAGE_STORE")
    with tempfile.TemporaryDirectory(prefix="dist-ft-images-", ignore_cleanup_errors=True) as folder:
        made = Images(Path(kept or folder) / "store", Path(folder))
        yield made
        made.remove_containers()


@pytest.fixture(scope="module")
def cpu(images: Images) -> str:
    return images.build("cpu")


@pytest.fixture(scope="module")
def client(images: Images) -> str:
    return images.build("client")


@pytest.fixture
def runs() -> Iterator[Path]:
    """A directory that uid 1000 may write to; pytest's own lie below one that it may not enter."""
    path = Path(tempfile.mkdtemp(prefix="dist-ft-runs-"))
    path.chmod(0o755)
    os.chown(path, 1000, 1000)
    yield path
    shutil.rmtree(path)


_WHO = r"""
echo "$(id -u):$(id -g) $(grep -c '^Cap.*:[[:space:]]*0*$' /proc/self/status) $(grep NoNewPrivs /proc/self/status)"
for place in / /opt/venv /usr/local /home /mnt/dist-ft /tmp /dev/shm; do
  touch $place/x 2>/dev/null && echo "writes $place"
done
tail -n +3 /proc/net/dev | cut -d: -f1
"""


def test_the_cpu_image_trains_without_rights_root_file_system_or_network(images: Images, cpu: str, runs: Path) -> None:
    said = images.run(images.command(cpu, ["bash", "-c", _WHO]))
    assert said.split("\n") == [
        "1000:1000 5 NoNewPrivs:\t1", "writes /tmp", "writes /dev/shm", "    lo", ""
    ], "five empty sets of capabilities, two places to write to, one interface"  # fmt: skip
    train = ["dist-ft", "train", "/configs/smoke/full.yaml", f"run.output_dir={_RUNS}", "run.name=r", "--json"]
    out = images.run(images.command(cpu, train, mounts=[f"{runs}:{_RUNS}", _CONFIGS]))
    result = json.loads(out.splitlines()[-1])
    assert (result["state"], result["steps"]) == ("completed", 20)
    assert sorted(last_rows(runs / "r" / "metrics.jsonl")) == list(range(1, 21))
    assert (runs / "r" / "exports" / "final" / "model.safetensors").is_file()
    assert {path.lstat().st_uid for path in runs.rglob("*")} == {1000}
    print(f"\n{cpu}: {images.size_bytes(cpu) / 1e9:.2f} GB")


def test_the_embedded_chat_model_can_be_made_in_the_image(images: Images, cpu: str, runs: Path) -> None:
    """What the smoke run needs besides: the packaged model, converted in /tmp."""
    plan = ["dist-ft", "data", "show", "/configs/smoke/lora.yaml", f"run.output_dir={_RUNS}", "--json"]
    out = images.run(images.command(cpu, plan, mounts=[f"{runs}:{_RUNS}", _CONFIGS]))
    assert json.loads(out.splitlines()[-1])


def test_the_client_has_the_commands_that_need_no_torch_and_says_so_of_the_others(images: Images, client: str) -> None:
    assert images.run(images.command(client, ["dist-ft", "--version"])).strip() == f"dist-ft {__version__}"
    script = "dist-ft train /configs/smoke/full.yaml 2>&1; echo $?; pip list 2>/dev/null | grep -ci '^torch'"
    said = images.run(images.command(client, ["sh", "-c", f"{script} || true"], mounts=[_CONFIGS])).splitlines()
    assert "has no torch" in said[0] and "submit" in said[0]
    assert said[1:] == ["2", "0"]
    assert images.size_bytes(client) < 1e9
    print(f"\n{client}: {images.size_bytes(client) / 1e9:.2f} GB")


@pytest.mark.parametrize("target", ["cpu", "client"])
def test_an_image_keeps_nothing_of_the_index_that_it_was_built_from(
    images: Images, request: pytest.FixtureRequest, target: str
) -> None:
    image = request.getfixturevalue(target)
    assert images.run(images.command(image, ["pip", "config", "list"])).strip() == ""
    assert images.run(images.command(image, ["sh", "-c", "test ! -s /etc/pip.conf && echo none"])).strip() == "none"
    assert "find-links" not in images.history(image) and "index-url" not in images.history(image)


def test_the_cluster_of_the_compose_file_takes_a_job_and_trains_on_two_containers(
    images: Images, cpu: str, client: str, runs: Path
) -> None:
    """Each service in a network namespace of its own, with its command, variables, mounts and health check."""
    token = runs / "ray-token"
    token.write_text(secrets.token_hex(32) + "\n")
    token.chmod(0o600)
    os.chown(token, 1000, 1000)
    with Network(["head", "worker-1", "worker-2", "client"]) as network:
        compose = Compose(images, network, runs, token)
        for name in ("head", "worker-1", "worker-2"):
            compose.up(name)
        job = ["submit", "/configs/smoke/full.yaml", f"run.output_dir={_RUNS}", "run.name=c", "--to", "ray", "--follow"]
        said = images.run(compose.command("client", job))
        images.remove_containers()
    assert f"completed after 20 steps: {_RUNS}/c" in said
    assert {row["world_size"] for row in last_rows(runs / "c" / "metrics.jsonl").values()} == {2}


class Network:
    """A namespace for each name, on one bridge that leads nowhere else."""

    def __init__(self, names: list[str]) -> None:
        self._prefix = f"dfi{os.getpid()}"
        self.addresses = {name: f"10.78.0.{10 + number}" for number, name in enumerate(names)}

    def namespace(self, name: str) -> str:
        """Name of a namespace."""
        return f"{self._prefix}-{name}"

    def __enter__(self) -> Network:
        switch = self.namespace("switch")
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", switch, "link", "set", "br0", "up")
        for number, (name, address) in enumerate(self.addresses.items()):
            space = self.namespace(name)
            _ip("netns", "add", space)
            _ip("-n", switch, "link", "add", f"p{number}", "type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("-n", switch, "link", "set", f"p{number}", "master", "br0", "up")
            _ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                _ip("-n", space, "link", "set", link, "up")
        return self

    def __exit__(self, *_: object) -> None:
        for name in ("switch", *self.addresses):
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("netns", "del", self.namespace(name))


class Compose:
    """Services of compose.yaml as podman's containers."""

    def __init__(self, images: Images, network: Network, runs: Path, token: Path) -> None:
        self._images, self._network, self._runs, self._token = images, network, runs, token
        self._services: dict[str, Any] = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]

    def up(self, name: str) -> None:
        """Starts a service and waits until its health check succeeds."""
        process = self._images.start(self.command(name, self._services[name]["command"]))
        check = self._services[name]["healthcheck"]["test"][1]

        def is_well() -> bool:
            assert process.poll() is None, f"{name} has ended with {process.returncode}"
            return self._images.exec(self._network.namespace(name), check)

        wait_until(is_well, 120, f"the health of {name}")

    def command(self, name: str, words: list[str]) -> list[str]:
        """Returns the command of a service's container."""
        service = self._services[name]
        sources = {"../runs": str(self._runs), "../configs": str(ROOT / "configs")}
        mounts = [
            f"{sources[volume['source']]}:{volume['target']}:{'ro' if volume.get('read_only') else 'rw'}"
            for volume in service["volumes"]
        ]
        hosts = [f"--add-host={host}:{address}" for host, address in self._network.addresses.items()]
        return self._images.command(
            f"localhost/{service['image']}", [*service.get("entrypoint", []), *words], env=service["environment"],
            network=f"ns:/run/netns/{self._network.namespace(name)}",
            mounts=[*mounts, f"{self._token}:/run/secrets/ray-token:ro"],
            options=[f"--name={self._network.namespace(name)}", f"--hostname={name}", *hosts],
        )  # fmt: skip


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
