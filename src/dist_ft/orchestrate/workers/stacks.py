"""Writes the Python stacks and the kernel state of a rank without progress into a file of the run.

At `DUMP_SIGNAL`, `faulthandler` writes all stacks of the rank to its log. It works in C, so it also works while the
rank waits in a collective or holds the interpreter's lock. A stopped process cannot answer and is reported as stopped.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import signal
import time
from pathlib import Path

from dist_ft.messages import Whereabouts

DUMP_SIGNAL = signal.SIGUSR2
_LIMIT_S = 1.5
_LOOK_S = 0.1
_LOOKS = 4
"""Equal sizes in a row after which a log counts as complete."""
_INNERMOST = 3  # all_reduce and the functions that wrap it


def answer_to_dump_signal() -> None:
    """Make this process write its stacks to standard error at `DUMP_SIGNAL`."""
    faulthandler.register(DUMP_SIGNAL, all_threads=True)


def dump_stacks(pid: int, log: Path, target: Path) -> Whereabouts:
    """Make a rank write its stacks, copy them from its log to a file, and return where the rank is.

    Args:
        pid: Process id of the rank on this machine.
        log: Log that receives its standard error.
        target: File to write.
    """
    with contextlib.suppress(OSError):  # the rank may end at this moment, or the disk may be full
        before = log.stat().st_size
        state = _kernel_view(pid)
        os.kill(pid, DUMP_SIGNAL)
        is_stopped = re.search(r"^State:\s+[Tt]", state, re.MULTILINE) is not None
        stacks = "" if is_stopped else _new_text(log, before)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(f"process {pid}\n{state}\n{stacks or 'it wrote no stacks; see State above'}\n")
        return "stopped" if is_stopped else "waits" if is_in_collective(stacks) else "works"
    return "works"


def is_in_collective(stacks: str) -> bool:
    """Return whether a thread is inside a call of torch.distributed, by the innermost frames of each thread.

    On a GPU, a rank waits for its peers in any call that waits for the device, so all ranks seem to work.
    """
    threads = re.split(r"^(?:Current t|T)hread 0x.*$", stacks, flags=re.MULTILINE)
    frames = (thread.strip().splitlines()[:_INNERMOST] for thread in threads)
    return any("/torch/distributed/" in frame for thread in frames for frame in thread)


def _kernel_view(pid: int) -> str:
    wanted = ("State:", "VmRSS:", "voluntary_ctxt_switches:")
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    lines = [line for line in status if line.startswith(wanted)]
    with contextlib.suppress(OSError):
        lines.append(f"waits in: {Path(f'/proc/{pid}/wchan').read_text() or '?'}")
    return "\n".join(lines)


def _new_text(log: Path, before: int) -> str:
    """Return the new text of a log when it has stopped growing; a busy machine writes the stacks in pieces."""
    sizes, deadline = [before], time.monotonic() + _LIMIT_S
    while time.monotonic() < deadline:
        time.sleep(_LOOK_S)
        sizes.append(log.stat().st_size)
        if sizes[-1] > before and len(set(sizes[-_LOOKS:])) == 1:
            break
    with log.open("rb") as file:
        file.seek(before)
        return file.read(1 << 20).decode(errors="replace")
