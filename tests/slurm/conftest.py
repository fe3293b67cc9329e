"""A real Slurm of two hosts in network namespaces, for the session. `make launch-tests` runs what is here.

Debian: `apt-get install slurm-wlm` (22.05 in bookworm). Nothing of the machine's own configuration is read or changed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.local.hosts import Hosts, why_not

_TOOLS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
# No munge, no cgroups: the hosts are one machine's, and root's. A requeued job may start again after five seconds.
_CONF = """\
ClusterName=test
SlurmctldHost=host1({ip1})
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
KillWait=5
MinJobAge=3600
SlurmctldPidFile=/tmp/slurmctld.pid
SlurmdPidFile=/tmp/slurmd.pid
SlurmdSpoolDir=/tmp/slurmd
StateSaveLocation=/tmp/slurmctld
SlurmctldLogFile={shared}/slurmctld.log
SlurmdLogFile={shared}/slurmd-%n.log
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
NodeName=host1 NodeAddr={ip1} CPUs=2 State=UNKNOWN
NodeName=host2 NodeAddr={ip2} CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_no_slurm() -> str | None:
    """Returns why there can be no Slurm here, or None."""
    if (reason := why_not()) is not None:
        return reason
    os.environ["PATH"] = f"{os.environ['PATH']}:/usr/sbin"
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    return f"{', '.join(missing)} not found (Debian: apt-get install slurm-wlm)" if missing else None


class Slurm:
    """Two hosts with a slurmd each; the first also has slurmctld, and is where users log in."""

    def __init__(self, hosts: Hosts) -> None:
        self._hosts = hosts
        self.shared_dir = hosts.shared_dir

    def run(self, *command: str, limit_s: float = 280.0) -> tuple[int, str, str]:
        """Runs a command on the first host."""
        done = subprocess.run(
            self._hosts.command(1, command), env=self._env(), capture_output=True, text=True, timeout=limit_s
        )
        return done.returncode, done.stdout, done.stderr

    def start(self) -> None:
        """Starts the daemons and waits until both nodes are idle."""
        ips = {f"ip{host}": self._hosts.ip(host) for host in (1, 2)}
        (self.shared_dir / "slurm.conf").write_text(_CONF.format(shared=self.shared_dir, **ips))
        (self.shared_dir / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        for host in (1, 2):
            self._on(host, "mount", "-t", "tmpfs", "tmpfs", "/sys/fs/cgroup")
            self._on(host, "mkdir", "-p", "/tmp/slurmd", "/tmp/slurmctld")
        self._on(1, "slurmctld")
        for host in (1, 2):
            self._on(host, "slurmd", "-N", f"host{host}")
        deadline = time.monotonic() + 60
        while self.run("sinfo", "--noheader", "--states=idle", "--format=%D")[1].strip() != "2":
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.2)

    def logs(self) -> str:
        """What the daemons and the jobs have written last."""
        files = sorted(self.shared_dir.glob("*.log"))
        return "\n".join(f"==> {file.name}\n{file.read_text(errors='replace')[-3000:]}" for file in files)

    def _on(self, host: int, *command: str) -> None:
        done = subprocess.run(
            self._hosts.command(host, command), env=self._env(), capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, (command, done.stderr, self.logs())

    def _env(self) -> dict[str, str]:
        env = {name: value for name, value in self._hosts.environment().items() if not name.startswith("RAY_")}
        return env | {"SLURM_CONF": str(self.shared_dir / "slurm.conf")}


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    if (reason := why_no_slurm()) is not None:
        pytest.skip(f"no Slurm here: {reason}")
    state = Path(tempfile.mkdtemp(prefix="dist-ft-slurm-"))
    hosts = Hosts(state, Path(sys.executable).parent)
    try:
        hosts.up(2, with_ray=False)
        cluster = Slurm(hosts)
        cluster.start()
        yield cluster
    finally:
        hosts.down()
        shutil.rmtree(state, ignore_errors=True)
