"""Keeps a run of this machine when its terminal is gone: starts it, waits for it, and writes down how it ended.

`LocalLauncher` starts this module with `python -m`, a folder and the command of the run. It leaves in the folder

- `output.log`: what the run prints;
- `processes.json`: which processes these are, by pid and start time, so that a pid that was given to another process
  is never taken for them;
- `ended.json`: the exit code, once there is one. If the keeper dies before, the run goes on, and nobody knows the code.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from dist_ft.layout import write_json

OUTPUT, PROCESSES, ENDED = "output.log", "processes.json", "ended.json"


@dataclass(frozen=True)
class Process:
    """A process of this machine since it was started: no other one has both numbers.

    Attributes:
        pid: Its id.
        start_ticks: Clock ticks between the machine's start and the process's.
    """

    pid: int
    start_ticks: int

    @classmethod
    def of(cls, pid: int) -> Process:
        """Returns the process that has an id now."""
        return cls(pid, _state_and_start(pid)[1])

    @property
    def is_alive(self) -> bool:
        """Whether it is still there, and not only its entry that nobody has collected."""
        try:
            state, start_ticks = _state_and_start(self.pid)
        except OSError:
            return False
        return start_ticks == self.start_ticks and state not in "ZX"

    def interrupt(self) -> None:
        """Sends SIGINT, if it is still there."""
        try:
            handle = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return
        try:
            if self.is_alive:  # by now the handle means this process or none
                signal.pidfd_send_signal(handle, signal.SIGINT)
        except ProcessLookupError:
            return
        finally:
            os.close(handle)


@dataclass(frozen=True)
class Processes:
    """Who works on a job.

    Attributes:
        host: Name of the machine.
        boot_id: Of the machine since it was started.
        keeper: Waits for the run.
        run: `dist-ft train`.
    """

    host: str
    boot_id: str
    keeper: Process
    run: Process


def _state_and_start(pid: int) -> tuple[str, int]:
    state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # the name may hold anything
    return state, int(fields[18])


def boot_id() -> str:
    """Returns what tells this start of the machine from others."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def keep(folder: Path, command: list[str], ready: int) -> None:
    """Runs a command to its end.

    Args:
        folder: Gets its output, and the two records.
        command: Program and arguments.
        ready: Pipe that is told when the command has been started.
    """
    with (folder / OUTPUT).open("ab") as log, Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # for the run, too
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job ignores it, but it is what stops the run
    run = subprocess.Popen(command)
    signal.signal(signal.SIGTERM, lambda number, _: run.send_signal(number))
    processes = Processes(socket.gethostname(), boot_id(), Process.of(os.getpid()), Process.of(run.pid))
    write_json(folder / PROCESSES, asdict(processes))
    os.write(ready, b"1")
    os.close(ready)
    code = run.wait()
    write_json(folder / ENDED, {"exit_code": code if code >= 0 else 128 - code})


def main() -> None:
    """Leaves the keeper in the background, and ends when the run has been started: 0, or 1 if it could not be.

    The keeper is no leader of its session, so that no terminal can ever become its own.
    """
    told, ready = os.pipe()
    if os.fork() == 0:
        os.close(told)
        keep(Path(sys.argv[1]), sys.argv[2:], ready)
        return
    os.close(ready)
    sys.exit(0 if os.read(told, 1) else 1)


if __name__ == "__main__":
    main()
