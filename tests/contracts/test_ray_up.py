"""cluster/ray-up is what Ray's cluster launcher takes: its schema, its own preparation, the options of `ray start`."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start

from tests.helpers.paths import ROOT

FILES = sorted((ROOT / "cluster" / "ray-up").glob("*.yaml"))
CLOUDS = [path for path in FILES if path.stem != "local"]


def load(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(path.read_text())
    return config


def ray_starts(config: dict[str, Any]) -> dict[str, str]:
    """The shell line that starts Ray, of the head and of a worker."""
    roles = ("head", "worker")
    return {role: next(c for c in config[f"{role}_start_ray_commands"] if "ray start" in c) for role in roles}


def parsed(line: str) -> dict[str, Any]:
    """The options of a `ray start`, by Ray's own parser."""
    return dict(start.make_context("start", line.rpartition("ray start")[2].split()).params)


def test_there_is_one_for_own_machines_and_one_a_cloud() -> None:
    assert [path.stem for path in FILES] == ["aws", "gcp", "local"]
    assert all(load(path)["provider"]["type"] == path.stem for path in FILES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_launcher_takes_it(path: Path) -> None:
    validate_config(prepare_config(load(path)))


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("idle_timeout_minute",), 5),
        (("max_workers",), "twelve"),
        (("provider", "worker_ips"), "10.0.0.11"),
        (("auth", "user"), "x"),
        (("provider", "security_group", "Ports"), [22]),
    ],
)
def test_the_schema_would_refuse_a_mistake(where: tuple[str, ...], value: object) -> None:
    """So the test above can fail."""
    config = load(ROOT / "cluster" / "ray-up" / "aws.yaml")
    section = config
    for key in where[:-1]:
        section = section[key]
    section[where[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        validate_config(copy.deepcopy(config))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_ray_starts_with_a_token_and_shows_its_dashboard_to_nobody(path: Path) -> None:
    config = load(path)
    for role, line in ray_starts(config).items():
        assert "RAY_AUTH_MODE=token" in line and "RAY_USAGE_STATS_ENABLED=0" in line
        options = parsed(line)
        assert options["head"] == (role == "head")
    assert parsed(ray_starts(config)["head"])["dashboard_host"] == "127.0.0.1"
    assert parsed(ray_starts(config)["head"])["num_cpus"] == 0, "ranks do not compute on the head"
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "0.0.0.0" not in path.read_text()
    port = parsed(ray_starts(config)["head"])["port"]
    assert parsed(ray_starts(config)["worker"])["address"] == f"$RAY_HEAD_IP:{port}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_installs_the_pinned_versions_where_ray_is_started_from(path: Path) -> None:
    config = load(path)
    assert any("--constraint ~/dist-ft/constraints.txt" in command for command in config["setup_commands"])
    needed = ("src", "pyproject.toml", "constraints.txt", "README.md", "LICENSE")
    sent = {remote: local for remote, local in config["file_mounts"].items() if "auth_token" not in remote}
    assert sent == {f"~/dist-ft/{name}": name for name in needed}
    assert all((ROOT / name).exists() for name in needed)
    assert all("PATH=$HOME/dist-ft-env/bin:$PATH" in line for line in ray_starts(config).values())


@pytest.mark.parametrize("path", CLOUDS, ids=lambda path: path.stem)
def test_workers_may_be_spot_the_head_never_and_both_kinds_have_bounds(path: Path) -> None:
    config = load(path)
    types = config["available_node_types"]
    spot = {name for name, kind in types.items() if re.search("spot|'preemptible': True", str(kind["node_config"]))}
    assert config["head_node_type"] == "head" and spot == {"gpu-spot"}
    workers = [kind for name, kind in types.items() if name != "head"]
    assert all(0 <= kind["min_workers"] <= kind["max_workers"] for kind in workers)
    assert types["gpu-spot"]["min_workers"] == 0 and types["gpu"]["min_workers"] >= 1
    assert sum(kind["max_workers"] for kind in workers) == config["max_workers"]


def test_only_ssh_is_let_in_and_not_from_everywhere() -> None:
    rules = load(ROOT / "cluster" / "ray-up" / "aws.yaml")["provider"]["security_group"]["IpPermissions"]
    assert [(rule["FromPort"], rule["ToPort"]) for rule in rules] == [(22, 22)]
    assert [allowed["CidrIp"] for rule in rules for allowed in rule["IpRanges"]] == ["203.0.113.0/24"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_key_stands_in_it(path: Path) -> None:
    assert not re.search(r"AKIA|aws_secret|PRIVATE KEY|hf_[A-Za-z0-9]{8}|WANDB_API_KEY", path.read_text())
