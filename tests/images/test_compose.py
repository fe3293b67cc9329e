"""compose.yaml has the shape of a compose file and is as closed as a pod. No container is started here."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from dist_ft import __version__
from dist_ft.cli.app import app
from tests.helpers.paths import ROOT

FILE = ROOT / "docker" / "compose.yaml"
COMPOSE = yaml.safe_load(FILE.read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
SERVER = "service"
NODES = ("head", "worker-1", "worker-2")
WRITABLE = {"/mnt/dist-ft/runs"}


def option(service: str, name: str) -> str:
    command = SERVICES[service]["command"]
    return str(command[command.index(name) + 1])


def test_there_are_a_head_two_workers_a_service_and_a_client() -> None:
    assert tuple(SERVICES) == (*NODES, SERVER, "client")
    assert (SERVICES["client"]["profiles"], SERVICES[SERVER]["profiles"]) == (["client"], ["service"]), "`up` alone"


@pytest.mark.parametrize("name", SERVICES)
def test_a_container_has_no_rights_and_nothing_to_write_to_but_tmp_and_the_runs(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"] and "cap_add" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["user"] == "${DIST_FT_UID:-1000}:${DIST_FT_GID:-1000}"
    assert not {"privileged", "network_mode", "pid", "ipc", "devices"} & set(service)
    assert [mount.partition(":")[0] for mount in service["tmpfs"]] == ["/tmp"]
    assert {v["target"] for v in service["volumes"] if not v.get("read_only")} <= WRITABLE


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_asks_for_the_token_which_is_a_file_and_no_variable(name: str) -> None:
    environment = SERVICES[name]["environment"]
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray-token"
    assert SERVICES[name]["secrets"] == (["ray-token", "service-key"] if name == SERVER else ["ray-token"])
    assert not {"RAY_AUTH_TOKEN", "WANDB_API_KEY", "HF_TOKEN"} & set(environment)
    ignored = (FILE.parents[1] / ".gitignore").read_text().splitlines()
    assert COMPOSE["secrets"] == {name: {"file": f"./{name}"} for name in ("ray-token", "service-key")}
    assert {"docker/ray-token", "docker/service-key"} <= set(ignored)


def test_only_the_dashboard_and_the_service_are_published_and_only_here() -> None:
    published = [port for service in SERVICES.values() for port in service.get("ports", [])]
    ports = (option("head", "--dashboard-port"), option(SERVER, "--port"))
    assert published == [f"127.0.0.1:{port}:{port}" for port in ports]


def test_the_service_keeps_its_store_where_the_workers_see_it_and_has_a_key_from_the_start() -> None:
    parsed = (
        typer.main.get_command(app)
        .commands["serve-api"]
        .make_context(  # type: ignore[attr-defined]
            "serve-api", SERVICES[SERVER]["command"][2:]
        )
    )
    given = parsed.params
    assert SERVICES[SERVER]["command"][:2] == ["dist-ft", "serve-api"]
    assert Path(given["store"]).parent == Path(SERVICES["worker-1"]["volumes"][0]["target"])
    assert SERVICES[SERVER]["volumes"] == SERVICES["worker-1"]["volumes"]
    assert given["admin_key_file"] == Path("/run/secrets/service-key")
    assert (given["launcher"], given["address"]) == ("ray", f"http://head:{option('head', '--dashboard-port')}")


def test_workers_join_the_head_when_it_is_well_and_every_node_says_how_it_is() -> None:
    for name in NODES:
        assert "wget" in SERVICES[name]["healthcheck"]["test"][1]
        assert SERVICES[name]["command"][:2] == ["ray", "start"] and "--block" in SERVICES[name]["command"]
    for name in ("worker-1", "worker-2"):
        assert option(name, "--address") == f"head:{option('head', '--port')}"
        assert SERVICES[name]["depends_on"] == {"head": {"condition": "service_healthy"}}


def test_images_are_targets_of_this_version_and_never_pulled() -> None:
    images = {name: (service["image"], service["pull_policy"]) for name, service in SERVICES.items()}
    assert images == {
        **dict.fromkeys((*NODES, SERVER), (f"dist-ft:{__version__}-cpu", "never")),
        "client": (f"dist-ft:{__version__}-client", "never"),
    }


def test_draining_ends_before_the_container_is_killed() -> None:
    for name in NODES:
        grace_s = int(SERVICES[name]["stop_grace_period"].removesuffix("s"))
        assert int(SERVICES[name]["environment"]["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]) < grace_s


def test_shared_memory_holds_the_object_store() -> None:
    for name in NODES:
        assert int(option(name, "--object-store-memory")) < int(SERVICES[name]["shm_size"].removesuffix("m")) * 2**20


def test_compose_itself_accepts_the_file() -> None:
    """Version 1 (docker-compose) is out of support and knows neither `name` nor `create_host_path`."""
    if (
        shutil.which("docker") is None
        or subprocess.run(["docker", "compose", "version"], capture_output=True).returncode
    ):
        pytest.skip("`docker compose` is not here")
    command = ["docker", "compose", "-f", str(FILE), "config", "-q"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
