"""Samples what a node is doing: cores, memory, disk, network, GPUs. One supervisor of each node sends it."""

from __future__ import annotations

import logging
import subprocess
from pathlib import Path

import psutil

from dist_ft.machine import has_gpu

logger = logging.getLogger(__name__)

EVERY_S = 15.0
_SMI = ("nvidia-smi", "--query-gpu=index,utilization.gpu,memory.used,temperature.gpu,power.draw",
        "--format=csv,noheader,nounits")  # fmt: skip
_SMI_NAMES = ("utilization_percent", "memory_mib", "temperature_c", "power_w")
_SMI_LIMIT_S = 5.0


class NodeSampler:
    """Samples this node at most every `EVERY_S` seconds; rates are means since the sample before.

    Args:
        directory: Whose disk is looked at.
        now: Monotonic time in seconds.
    """

    def __init__(self, directory: Path, now: float) -> None:
        self._directory = directory
        self._taken_at = now
        self._sent, self._received = _traffic()
        self._has_gpu = has_gpu()
        psutil.cpu_percent()  # the first call begins the measurement

    def sample(self, now: float) -> dict[str, float] | None:
        """Return the numbers of this node by name; None where it is too early for a sample."""
        passed = now - self._taken_at
        if passed < EVERY_S:
            return None
        self._taken_at = now
        sent, received = _traffic()
        memory = psutil.virtual_memory()
        numbers = {
            "cpu_percent": psutil.cpu_percent(),
            "memory_percent": memory.percent,
            "memory_used_gib": round((memory.total - memory.available) / 2**30, 3),
            "network_sent_mb_s": round(max(0, sent - self._sent) / passed / 1e6, 3),
            "network_received_mb_s": round(max(0, received - self._received) / passed / 1e6, 3),
        }
        self._sent, self._received = sent, received
        if self._directory.exists():
            numbers["disk_percent"] = psutil.disk_usage(str(self._directory)).percent
        return {**numbers, **(_gpus() if self._has_gpu else {})}


def parse_gpus(text: str) -> dict[str, float]:
    """Return the numbers of GPUs from the output of nvidia-smi; one that it does not know is left out."""
    found = {}
    for line in text.splitlines():
        index, *values = [part.strip() for part in line.split(",")]
        for name, value in zip(_SMI_NAMES, values, strict=False):
            try:
                found[f"gpu{index}_{name}"] = float(value)
            except ValueError:
                continue  # [N/A]
    return found


def _gpus() -> dict[str, float]:
    try:
        done = subprocess.run(_SMI, capture_output=True, text=True, timeout=_SMI_LIMIT_S, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        logger.debug("nvidia-smi: %s", error)
        return {}
    return parse_gpus(done.stdout)


def _traffic() -> tuple[int, int]:
    """Return bytes sent and received by this node."""
    counters = psutil.net_io_counters()
    return (0, 0) if counters is None else (counters.bytes_sent, counters.bytes_recv)
