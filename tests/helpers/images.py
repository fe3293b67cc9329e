"""Images built with buildah on a base made here, and containers of them with podman: no registry, no daemon, but root.

What pip needs to reach an index from here is handed to the build as a secret and as mounts.
"""

from __future__ import annotations

import ast
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from dist_ft import __version__
from tests.helpers.paths import ROOT

_TOOLS = ("buildah", "podman", "runc", "debootstrap", "ip")
_BASE = "localhost/python:3.11-slim-bookworm"
_BUILD_LIMIT_S = 1500.0
# What a pod's securityContext and compose.yaml ask for. Without the limits podman would want CAP_SYS_RESOURCE.
_CLOSED = (
    "--read-only", "--read-only-tmpfs=false", "--tmpfs=/tmp:mode=1777,size=2g,noexec,nosuid,nodev", "--shm-size=512m",
    "--cap-drop=all", "--security-opt=no-new-privileges", "--ulimit=nofile=20000:20000", "--ulimit=nproc=8000:8000",
    "--no-healthcheck", "--pull=never",
)  # fmt: skip


def why_not() -> str | None:
    """Returns why images cannot be built on this machine, or None."""
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64" or os.geteuid() != 0:
        return "building images needs root on Linux x86-64"
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        packages = "buildah podman runc debootstrap iproute2"
        return f"{', '.join(missing)} not found (Debian: apt-get install --no-install-recommends {packages})"
    if subprocess.run(["unshare", "--net", "--mount", "true"], capture_output=True).returncode:
        return "`unshare --net --mount true` is refused: this container lacks CAP_SYS_ADMIN"
    return None


class Images:
    """The images of one store.

    Args:
        store: Folder of layers and containers.
        scratch: Folder for what is made on the way.
    """

    def __init__(self, store: Path, scratch: Path) -> None:
        store.mkdir(parents=True, exist_ok=True)
        self._scratch = scratch
        config = scratch / "storage.conf"
        driver = "overlay" if _has_overlay(scratch) else "vfs"
        config.write_text(f'[storage]\ndriver="{driver}"\ngraphroot="{store}/graph"\nrunroot="{store}/run"\n')
        self._env = {**os.environ, "CONTAINERS_STORAGE_CONF": str(config)}

    def build(self, target: str) -> str:
        """Builds a target of docker/Dockerfile with its own base; returns the image's name."""
        self._make_base()
        name = f"localhost/dist-ft:{__version__}-{target}"
        secret, mounts = self._index_settings()
        self._run(
            "nice", "buildah", "bud", "--isolation", "chroot", "--pull-never", "--format", "docker",
            "--build-arg", f"BASE_IMAGE={_BASE}", "--secret", f"id=pip,src={secret}",
            *(f"--volume={path}:{path}:ro" for path in mounts),
            "--file", "docker/Dockerfile", "--target", target, "--tag", name, ".",
            limit_s=_BUILD_LIMIT_S,
        )  # fmt: skip
        return name

    def size_bytes(self, image: str) -> int:
        """What an image takes, its base included."""
        return int(self._run("podman", "image", "inspect", "--format", "{{.Size}}", image))

    def history(self, image: str) -> str:
        """The commands and settings that an image keeps."""
        return self._run("podman", "image", "inspect", image)

    def command(
        self,
        image: str,
        words: Sequence[str],
        *,
        network: str = "none",
        env: Mapping[str, str] | None = None,
        mounts: Sequence[str] = (),
        options: Sequence[str] = (),
    ) -> list[str]:
        """Returns the command that runs `words` in a container with nothing to write to but /tmp and `mounts`.

        Args:
            image: Name.
            words: Command.
            network: `none` (a loopback of its own) or `ns:/run/netns/NAME`.
            env: Variables besides the image's.
            mounts: `PATH:TARGET` or `PATH:TARGET:ro`.
            options: More of podman's.
        """
        return [
            "podman", "--runtime", "runc", "--cgroup-manager", "cgroupfs", "run", "--rm", "--network", network,
            *_CLOSED, *(f"--env={name}={value}" for name, value in (env or {}).items()),
            *(f"--volume={mount}" for mount in mounts), *options, image, *words,
        ]  # fmt: skip

    def run(self, command: Sequence[str], limit_s: float = 300.0) -> str:
        """Runs what `command` gave; returns its standard output."""
        return self._run(*command, limit_s=limit_s)

    def start(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        """Starts what `command` gave; SIGTERM reaches the container's first process."""
        return subprocess.Popen(command, env=self._env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def exec(self, container: str, shell: str) -> bool:
        """Whether a shell command in a running container ends well."""
        words = ["podman", "--runtime", "runc", "--cgroup-manager", "cgroupfs", "exec", container, "sh", "-c", shell]
        return subprocess.run(words, env=self._env, capture_output=True, timeout=60, check=False).returncode == 0

    def remove_containers(self) -> None:
        """Ends and removes every container of this store."""
        self._run(
            "podman", "--runtime", "runc", "--cgroup-manager", "cgroupfs", "rm", "--all", "--force", "--time", "5"
        )

    def _run(self, *command: str, limit_s: float = 300.0) -> str:
        done = subprocess.run(
            command, env=self._env, cwd=ROOT, capture_output=True, text=True, timeout=limit_s, check=False
        )
        assert done.returncode == 0, (
            f"{command}: exit code {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        )
        return done.stdout

    def _make_base(self) -> None:
        """Debian with its own Python of the same minor, in place of the official Python image."""
        if _BASE in self._run("podman", "images", "--format", "{{.Repository}}:{{.Tag}}"):
            return
        root = self._scratch / "base"
        self._run(
            "debootstrap",
            "--variant=minbase",
            "--include=python3-venv,ca-certificates",
            "bookworm",
            str(root),
            limit_s=600,
        )
        (root / "usr/bin/python").symlink_to("python3")
        archive = self._scratch / "base.tar"
        unneeded = ("./proc/*", "./sys/*", "./var/cache/apt/*", "./var/lib/apt/lists/*")
        self._run("tar", "-C", str(root), *(f"--exclude={path}" for path in unneeded), "-cf", str(archive), ".")
        self._run("podman", "import", str(archive), _BASE)
        archive.unlink()
        shutil.rmtree(root)

    def _index_settings(self) -> tuple[Path, list[Path]]:
        """Writes this machine's pip settings to one file; returns it and the paths that they name."""
        said = subprocess.run(
            [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
        )
        settings: dict[str, str] = {}
        for line in said.stdout.splitlines():
            key, _, value = line.partition("=")
            settings[key.rpartition(".")[2]] = str(ast.literal_eval(value)).replace("\n", " ")
        path = self._scratch / "pip.conf"
        path.write_text("\n".join(["[global]", *(f"{key} = {value}" for key, value in settings.items()), ""]))
        words = [word for value in settings.values() for word in value.split()]
        # An index in a folder names its files in folders beside it.
        named = [Path(word[7:]).parent if word.startswith("file://") else Path(word) for word in words]
        return path, sorted({path for path in named if path.is_absolute() and path.exists()})


def wait_until(condition: Callable[[], bool], limit_s: float, what: str) -> None:
    """Waits for a condition."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} took longer than {limit_s:.0f} s"
        time.sleep(0.5)


def _has_overlay(scratch: Path) -> bool:
    """vfs, the other driver, copies every layer and every container."""
    lower, upper, work, merged = (scratch / "overlay" / name for name in ("lower", "upper", "work", "merged"))
    for path in (lower, upper, work, merged):
        path.mkdir(parents=True, exist_ok=True)
    options = f"lowerdir={lower},upperdir={upper},workdir={work}"
    mount = f"mount -t overlay overlay -o {options} {merged}"
    return subprocess.run(["unshare", "--mount", "sh", "-c", mount], capture_output=True).returncode == 0
