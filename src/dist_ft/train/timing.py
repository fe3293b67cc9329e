"""Measures a piece of work on the CPU or, without waiting for it, on the GPU."""

from __future__ import annotations

import time

import torch


class Stopwatch:
    """Measures the time between its creation and `stop`.

    Args:
        device: Where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._began = time.perf_counter()
        self._events = None
        if device.type == "cuda":
            self._events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            self._events[0].record()

    def stop(self) -> None:
        """Mark the end of the work."""
        self._ended = time.perf_counter()
        if self._events is not None:
            self._events[1].record()

    @property
    def seconds(self) -> float:
        """Seconds from creation to `stop`; on a GPU this waits until the work is done."""
        if self._events is None:
            return self._ended - self._began
        self._events[1].synchronize()
        milliseconds: float = self._events[0].elapsed_time(self._events[1])
        return milliseconds / 1000
