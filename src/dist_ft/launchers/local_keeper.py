"""Starts a run of this machine without a terminal, waits for its end, and records its exit code.

`LocalLauncher` runs this module with `python -m`, a folder and the command of the run. It writes into the folder

- `output.log`: the output of the run;
- `processes.json`: the processes by pid and start time, so that another process that gets the same pid later is not
  mistaken for one of them;
- `ended.json`: the exit code. If the keeper is killed, the run goes on, and its exit code is lost.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from dist_ft.storage.publish import write_json

OUTPUT, PROCESSES, ENDED = "output.log", "processes.json", "ended.json"


@dataclass(frozen=True)
class Process:
    """A process of this machine. Until the next boot no other process has the same two numbers.

    Attributes:
        pid: Its id.
        start_ticks: Clock ticks from the machine's boot to the start of the process.
    """

    pid: int
    start_ticks: int

    @classmethod
    def of(cls, pid: int) -> Process:
        """Return the process that has this pid now."""
        return cls(pid, _state_and_start(pid)[1])

    @property
    def is_alive(self) -> bool:
        """Whether it still runs; a zombie does not."""
        try:
            state, start_ticks = _state_and_start(self.pid)
        except OSError:
            return False
        return start_ticks == self.start_ticks and state not in "ZX"

    def interrupt(self) -> None:
        """Send SIGINT if it still runs."""
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
    """The processes of a job.

    Attributes:
        host: Name of the machine.
        boot_id: Kernel's id of the machine's current boot.
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
    """Return the kernel's id of the current boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def keep(folder: Path, command: list[str], ready: int) -> None:
    """Run a command to its end.

    Args:
        folder: Where the output and the two records are written.
        command: Program and arguments.
        ready: Pipe that gets a byte once the command has been started.
    """
    with (folder / OUTPUT).open("ab") as log, Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # for the run, too
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job ignores it, but it is what stops the run
    run = subprocess.Popen(command)
    signal.signal(signal.SIGTERM, lambda number, _: run.send_signal(number))
    try:
        processes = Processes(socket.gethostname(), boot_id(), Process.of(os.getpid()), Process.of(run.pid))
        write_json(folder / PROCESSES, asdict(processes))
    except OSError:
        run.kill()  # the submission fails, and nobody could find the run or stop it
        run.wait()
        raise
    os.write(ready, b"1")
    os.close(ready)
    code = run.wait()
    write_json(folder / ENDED, {"exit_code": code if code >= 0 else 128 - code})


def main() -> None:
    """Forks the keeper into the background. Exits with 0 once the run has been started, or 1 if it could not be.

    The keeper does not lead its session, so it can never get a controlling terminal.
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
