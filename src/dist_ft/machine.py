"""What this machine has (cores, GPUs, memory, a home), and how many workers a node holds.

Reads /proc, /dev and cgroups; loads no driver.
"""

from __future__ import annotations

import getpass
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from dist_ft.errors import UsageError

OWN_PYTHON = (sys.executable, "-P")
"""Runs processes of dist-ft. With `-P` no module in the current directory takes the place of a library."""


def worker_resources(asked: Mapping[str, float] | None, *, has_gpu: bool) -> dict[str, float]:
    """Return the Ray resources of one worker.

    Args:
        asked: `cluster.resources_per_worker`.
        has_gpu: Whether the nodes have GPUs. Counts where nothing is asked for.
    """
    if asked:
        return dict(asked)
    return {"GPU": 1.0, "CPU": 1.0} if has_gpu else {"CPU": 1.0}


def workers_on(node: Mapping[str, float], worker: Mapping[str, float]) -> int | None:
    """Return how many workers a node holds; None if a worker needs nothing, so that any number fits.

    Args:
        node: Resources of the node. One that is not named is taken as 0.
        worker: Resources of one worker.
    """
    # Ray keeps fractions of 1/10000; what is left after giving and taking back may be just below a whole number.
    counts = [int(node.get(name, 0.0) / amount + 1e-6) for name, amount in worker.items() if amount > 0]
    return min(counts, default=None)


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def local_slots() -> int:
    """Return the CPU slots of a Ray that we start: logical ones, up to four a core, at least eight."""
    return max(8, 4 * num_cores())


def count_gpus() -> int:
    """Count NVIDIA devices by their device files, without a driver call."""
    return sum(1 for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name))


def has_gpu() -> bool:
    """Return whether this machine has an NVIDIA device, without loading CUDA."""
    return Path("/dev/nvidiactl").exists()


def has_fast_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Return whether this CPU has instructions that oneDNN computes bfloat16 with; True where that is unknown."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return True
    flags = {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split(":")[1].split()}
    return not flags or bool(flags & {"avx512bw", "avx_ne_convert", "amx_bf16", "bf16"})


def available_memory_bytes() -> int | None:
    """Return the memory that new processes can have, within the container's limit; None where it is unknown."""
    found = []
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        found += [int(kib) << 10 for kib in re.findall(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)]
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        found += [int(limit)] if limit.isdigit() else []
    except OSError:
        pass
    return min(found, default=None)


def size_of_shared_memory(path: Path = Path("/dev/shm")) -> int | None:
    """Return the size of /dev/shm, used or not; None where there is none."""
    return shutil.disk_usage(path).total if path.is_dir() else None


def can_write(path: Path) -> bool:
    """Return whether this process may write a path, or create it in the nearest directory above it that exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return os.access(path, os.W_OK | os.X_OK)


def home_env() -> dict[str, str]:
    """Return the variables that libraries need where this user has no home that can be written; usually none.

    In a container a user may have no entry in /etc/passwd, or `HOME=/`. Some libraries then fail, others write into the
    current directory.

    Raises:
        UsageError: The folder that takes the place of the home belongs to somebody else.
    """
    found = {}
    try:
        getpass.getuser()
    except (KeyError, OSError):
        found["USER"] = str(os.getuid())
    try:
        home = Path.home()
    except RuntimeError:
        return {**found, "HOME": str(_own_temp_dir())}
    if not os.environ.get("XDG_CACHE_HOME") and not can_write(home / ".cache"):
        found["XDG_CACHE_HOME"] = str(_own_temp_dir() / "cache")
    return found


def _own_temp_dir() -> Path:
    """Return this user's folder of the temp directory. Anybody could have made it before, so its owner is checked."""
    path = Path(tempfile.gettempdir()) / f"dist-ft-home-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    facts = path.lstat()
    if path.is_symlink() or facts.st_uid != os.getuid() or facts.st_mode & 0o077:
        raise UsageError(
            f"there is no home directory that can be written, and {path} is not this user's alone; set HOME or "
            "XDG_CACHE_HOME to a directory of your own"
        )
    return path


def nvidia_driver(path: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """Return the version of NVIDIA's driver; None where there is none."""
    try:
        found = re.search(r"Kernel Module\D+([\d.]+)", path.read_text(errors="replace"))
    except OSError:
        return None
    return found[1] if found else None
