"""First process of a host of `hosts.py`: makes its private file systems, then is the parent of every orphan there.

Runs in namespaces of its own, with root's rights; `hosts.py` starts it as `host_init.py NAME HOSTS_FILE SHARED_DIR...`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

_TMP_SIZE = "2g"
_SHM_SIZE = "300m"


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def make_file_systems(hosts_path: str, shared: list[str]) -> None:
    """Gives this mount namespace its own /etc/hosts, /tmp and /dev/shm; shared directories keep their paths."""
    _mount("--bind", hosts_path, "/etc/hosts")
    # /tmp is put together at /mnt, because the shared directories may lie in the /tmp that it hides.
    _mount("-t", "tmpfs", "-o", f"size={_TMP_SIZE},mode=1777", "tmpfs", "/mnt")
    for path in map(Path, shared):
        if path.is_relative_to("/tmp"):
            target = "/mnt" / path.relative_to("/tmp")
            target.mkdir(parents=True, exist_ok=True)
            _mount("--rbind", str(path), str(target))
    _mount("--move", "/mnt", "/tmp")
    _mount("-t", "tmpfs", "-o", f"size={_SHM_SIZE}", "tmpfs", "/dev/shm")


def main() -> None:
    """Never returns; the host ends when this process is killed."""
    name, hosts_path, *shared = sys.argv[1:]
    make_file_systems(hosts_path, shared)
    socket.sethostname(name)
    # Blocked, not ignored: who ignores it never sees the dead.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    os.write(1, b"ready\n")
    for number in (1, 2):
        os.dup2(0, number)  # the reader of these pipes goes away
    while True:
        signal.sigwait([signal.SIGCHLD])
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


if __name__ == "__main__":
    main()
