"""What this machine has: cores, GPUs, memory. Reads /proc, /dev and cgroups; loads no driver."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def local_slots() -> int:
    """CPU worker slots of a Ray that we start: logical, up to four a core, at least eight."""
    return max(8, 4 * num_cores())


def count_gpus() -> int:
    """Counts NVIDIA devices by their device files, without a driver call."""
    return sum(1 for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name))


def has_gpu() -> bool:
    """Whether this machine has an NVIDIA device, found without loading CUDA."""
    return Path("/dev/nvidiactl").exists()


def has_fast_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this CPU has instructions that oneDNN computes bfloat16 with; yes where that cannot be found out."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return True
    flags = {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split(":")[1].split()}
    return not flags or bool(flags & {"avx512bw", "avx_ne_convert", "amx_bf16", "bf16"})


def available_memory_bytes() -> int | None:
    """Returns the memory that new processes can have, container limit included; None where it is unknown."""
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
    """Returns the size of /dev/shm, used or not; None where there is none."""
    return shutil.disk_usage(path).total if path.is_dir() else None


def nvidia_driver(path: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """Returns the version of NVIDIA's driver, if there is one."""
    try:
        found = re.search(r"Kernel Module\D+([\d.]+)", path.read_text(errors="replace"))
    except OSError:
        return None
    return found[1] if found else None
