#!/usr/bin/env python3
"""Several hosts on one Linux machine, each with its own network, processes, /tmp and Ray node, to be disturbed.

Owns the network namespaces whose names begin with its prefix, and every process in them; what is true of a host is
read from the kernel, so nothing here can be out of date after a crash. Nothing is added to the machine's own network:
the hosts reach one another and nothing else. Needs root. How to try a node loss: README.md beside this file.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
DEFAULT_STATE = Path("/tmp/dist-ft-hosts")

_MOST_HOSTS = 99
_PORT = 6379
_OBJECT_STORE_BYTES = 100_000_000  # messages only; more than half of what /dev/shm holds is refused
_RAY_START_LIMIT_S = 180.0  # 3 to 15 s on two idle cores
_END_LIMIT_S = 20.0
_TOOLS = ("ip", "nsenter", "unshare", "mount")

# A host that is off is declared dead after 3 s and one that is silent after 9 s, not 13 s and 64 s. For trying out:
# on a busy cluster such limits would declare living nodes dead.
_HEAD_ENV = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}


class HostsError(Exception):
    """What a user can put right; the message says how."""


@dataclass(frozen=True)
class Process:
    """A process on a host.

    Attributes:
        pid: As this machine sees it; what to signal.
        inner_pid: As the host sees it; what programs on the host report.
        command: Its command line, words separated by blanks.
    """

    pid: int
    inner_pid: int
    command: str


def why_not() -> str | None:
    """Returns why hosts cannot be made on this machine, or None."""
    if not sys.platform.startswith("linux"):
        return "network namespaces are Linux-only"
    if os.geteuid() != 0:
        return "making network namespaces needs root"
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not found (Debian: apt-get install iproute2 util-linux mount)"
    if subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode:
        return "`unshare --net true` is refused: this container lacks CAP_SYS_ADMIN"
    return None


class Hosts:
    """The hosts of one state directory, numbered from 1; host 1 runs the Ray head.

    The state directory keeps the token, the settings of `up` and the logs of Ray. Two of them do not see each other.

    Args:
        state_dir: Made by `up`. Its `shared/` lies at the same path on every host, as a shared disk would.
        bin_dir: Where `ray` and `dist-ft` are.
    """

    def __init__(self, state_dir: Path = DEFAULT_STATE, bin_dir: Path | None = None) -> None:
        self._dir = state_dir.absolute()
        self._bin_dir = bin_dir or Path(sys.executable).parent
        self._prefix = "df" + hashlib.sha256(str(self._dir).encode()).hexdigest()[:6]
        self._switch = f"{self._prefix}-sw"

    @property
    def shared_dir(self) -> Path:
        """The disk that all hosts see, and this machine."""
        return self._dir / "shared"

    @property
    def address(self) -> str:
        """Address of the Ray head."""
        return f"{self.ip(1)}:{_PORT}"

    @staticmethod
    def ip(host: int) -> str:
        """Address of a host."""
        return f"10.77.0.{10 + host}"

    def up(
        self,
        num_hosts: int,
        num_cpus: int = 1,
        drain_s: float = 30.0,
        with_ray: bool = True,
        with_dashboard: bool = False,
    ) -> None:
        """Makes the hosts and starts a Ray node on each.

        Args:
            num_hosts: How many; host 1 is the head.
            num_cpus: Ray CPUs, that is worker slots, of each host.
            drain_s: How long a drained node keeps its work.
            with_ray: False leaves the hosts bare, for whoever starts Ray there himself.
            with_dashboard: Start Ray's dashboard on host 1, for jobs that are submitted there; loopback only.

        Raises:
            HostsError: They are there already, cannot be made here, or Ray does not start.
        """
        if (reason := why_not()) is not None:
            raise HostsError(reason)
        if not 1 <= num_hosts <= _MOST_HOSTS:
            raise HostsError(f"{num_hosts} hosts; between 1 and {_MOST_HOSTS} can be made")
        if self._namespaces():
            raise HostsError(f"hosts of {self._dir} are there already; `down` removes them")
        if not (self._bin_dir / "ray").exists():
            raise HostsError(f"{self._bin_dir} has no `ray`; run this with the python of the project's environment")
        self.shared_dir.mkdir(parents=True, exist_ok=True)
        self._dir.chmod(0o700)
        settings = {
            "num_hosts": num_hosts, "num_cpus": num_cpus, "drain_s": drain_s,
            "with_dashboard": with_dashboard, "token": secrets.token_hex(32),
        }  # fmt: skip
        self._settings_path.touch(mode=0o600)
        self._settings_path.write_text(json.dumps(settings))
        names = [f"{self.ip(host)} host{host}" for host in self.all()]
        self._hosts_path.write_text("\n".join(["127.0.0.1 localhost", *names, ""]))
        self._make_network()
        for host in self.all():
            self._boot(host)
        if with_ray:
            self._start_ray([1])
            self._start_ray(self.all()[1:])

    def all(self) -> list[int]:
        """Numbers of all hosts, on or off."""
        return list(range(1, self._settings()["num_hosts"] + 1))

    def command(self, host: int, command: Sequence[str]) -> list[str]:
        """Returns the command that runs a command on a host, in this directory if the host has it.

        Ending it does not end what runs on the host: signal that by the `pid` of `processes`. Use `environment`.
        """
        here = Path.cwd()
        start_dir = here if self._is_visible(here) else REPOSITORY
        init = str(self._init_of(host).pid)
        return [
            "nsenter",
            "--target",
            init,
            "--net",
            "--mount",
            "--pid",
            "--uts",
            "env",
            "-C",
            str(start_dir),
            *command,
        ]

    def environment(self) -> dict[str, str]:
        """Returns the environment of commands on hosts: this one, with the token of this Ray."""
        foreign = ("RAY_", "TMPDIR")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        return kept | {
            "PATH": f"{self._bin_dir}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            "OMP_WAIT_POLICY": "PASSIVE",  # the hosts share the cores: who spins while waiting takes them from another
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self._settings()["token"],
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_enable_worker_prestart": "0",  # idle processes that nobody asked for, on every host
        }

    def processes(self, host: int) -> list[Process]:
        """Returns the processes on a host; none when it is off."""
        return [process for process in _processes(self._namespace(host)) if process.inner_pid]

    def is_on(self, host: int) -> bool:
        """Whether a host runs."""
        return any(process.inner_pid == 1 for process in self.processes(host))

    def off(self, host: int) -> None:
        """Switches a host off: every process of it dies at once, and its peers see their connections end."""
        os.kill(self._init_of(host).pid, signal.SIGKILL)
        _wait_for(lambda: not _processes(self._namespace(host)), _END_LIMIT_S, f"the end of host {host}")

    def on(self, host: int) -> None:
        """Starts a host that is off, and its Ray node when it has none."""
        if not self.is_on(host):
            self._boot(host)
        if self._ray_start_of(host) is None:
            self._start_ray([host])

    def unplug(self, host: int) -> None:
        """Pulls a host's network cable: silence in both directions, everything on it goes on."""
        self._on_switch("link", "set", self._port(host), "down")

    def plug(self, host: int) -> None:
        """Puts the cable in again."""
        self._on_switch("link", "set", self._port(host), "up")

    def slow(self, host: int, delay_ms: float, loss: float = 0.0) -> None:
        """Delays every packet from and to a host, and drops some.

        Args:
            host: Which one.
            delay_ms: Milliseconds in each direction; a round trip takes twice as long. 0 and no loss: as before.
            loss: Percent of the packets of each direction, 0 to 100.
        """
        port, inner, outer = self._port(host), f"q{host}", f"r{host}"
        for process in _processes(self._switch):
            if f"slow_link.py {port} " in process.command:
                _kill([process])
        if self._has_link(inner):
            self._on_switch("link", "del", inner)
        if delay_ms <= 0 and loss <= 0:
            self._on_switch("link", "set", port, "master", "br0")
            return
        self._on_switch("link", "set", port, "nomaster")
        self._on_switch("link", "add", inner, "type", "veth", "peer", "name", outer)
        self._on_switch("link", "set", outer, "master", "br0", "up")
        self._on_switch("link", "set", inner, "up")
        relay = [sys.executable, str(Path(__file__).with_name("slow_link.py")), port, inner]
        relay += [f"--delay-ms={delay_ms:g}", f"--loss={loss:g}"]
        _launch(["ip", "netns", "exec", self._switch, *relay], f"the slow link of host {host}")

    def drain(self, host: int) -> None:
        """Tells a host's Ray node to end as a preempted machine would: a notice, `drain_s` seconds, then the end.

        The host itself stays on; `on` starts another Ray node there.
        """
        process = self._ray_start_of(host)
        if process is None:
            raise HostsError(f"host {host} has no Ray node; `on {host}` starts one")
        os.kill(process.pid, signal.SIGTERM)  # how Kubernetes says it, too

    def down(self) -> None:
        """Removes hosts, network, token and logs; what lies in the shared directory stays. May be repeated."""
        for name in self._namespaces():
            _end_all_in(name)
            _run("ip", "netns", "del", name)
        for path in (self._settings_path, self._hosts_path, *self._dir.glob("ray-*.log")):
            path.unlink(missing_ok=True)
        for directory in (self.shared_dir, self._dir):
            with contextlib.suppress(OSError):  # not empty, or not there
                directory.rmdir()

    @property
    def _settings_path(self) -> Path:
        return self._dir / "settings.json"

    @property
    def _hosts_path(self) -> Path:
        return self._dir / "hosts"

    def _settings(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self._settings_path.read_text()))
        except FileNotFoundError:
            raise HostsError(f"there are no hosts in {self._dir}; `up N` makes some") from None

    def _namespace(self, host: int) -> str:
        if host not in self.all():
            raise HostsError(f"there is no host {host}; the last one is {self.all()[-1]}")
        return f"{self._prefix}-{host}"

    def _namespaces(self) -> list[str]:
        names = [line.split()[0] for line in _run("ip", "netns", "list").splitlines() if line]
        return [name for name in names if name.startswith(f"{self._prefix}-")]

    def _port(self, host: int) -> str:
        self._namespace(host)
        return f"p{host}"

    def _on_switch(self, *arguments: str) -> None:
        _run("ip", "-n", self._switch, *arguments)

    def _has_link(self, name: str) -> bool:
        command = ["ip", "-n", self._switch, "link", "show", name]
        return subprocess.run(command, capture_output=True).returncode == 0

    def _init_of(self, host: int) -> Process:
        for process in self.processes(host):
            if process.inner_pid == 1:
                return process
        raise HostsError(f"host {host} is off; `on {host}` starts it")

    def _ray_start_of(self, host: int) -> Process | None:
        starts = (p for p in self.processes(host) if f"{self._bin_dir}/ray start " in p.command)
        return next(starts, None)

    def _is_visible(self, path: Path) -> bool:
        shared = any(path.is_relative_to(directory) for directory in self._shared())
        return shared or not any(path.is_relative_to(hidden) for hidden in ("/tmp", "/dev/shm"))

    def _shared(self) -> tuple[Path, ...]:
        return self.shared_dir, REPOSITORY, self._bin_dir.parent

    def _make_network(self) -> None:
        _run("ip", "netns", "add", self._switch)
        self._on_switch("link", "add", "br0", "type", "bridge")
        self._on_switch("link", "set", "br0", "up")
        for host in self.all():
            name, port = self._namespace(host), self._port(host)
            _run("ip", "netns", "add", name)
            # Made where it ends up: no name on the machine's own network that could be taken.
            self._on_switch("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", name)
            self._on_switch("link", "set", port, "master", "br0", "up")
            _run("ip", "-n", name, "addr", "add", f"{self.ip(host)}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                _run("ip", "-n", name, "link", "set", link, "up")

    def _boot(self, host: int) -> None:
        """Starts a host's first process."""
        into = ["nsenter", f"--net=/run/netns/{self._namespace(host)}"]
        apart = ["unshare", "--mount", "--uts", "--pid", "--fork", "--mount-proc"]
        init = [sys.executable, str(Path(__file__).with_name("host_init.py")), f"host{host}", str(self._hosts_path)]
        _launch([*into, *apart, *init, *map(str, self._shared())], f"host {host}")

    def _start_ray(self, hosts: Sequence[int]) -> None:
        """Starts the Ray nodes of some hosts at the same time, and waits for them."""
        logs = {host: self._dir / f"ray-{host}.log" for host in hosts}
        for host, path in logs.items():
            settings = self._settings()
            dashboard = [f"--include-dashboard={str(settings['with_dashboard']).lower()}", "--dashboard-host=127.0.0.1"]
            where = ["--head", f"--port={_PORT}", *dashboard] if host == 1 else []
            where = where or [f"--address={self.address}"]
            command = [f"{self._bin_dir}/ray", "start", "--block", *where, f"--node-ip-address={self.ip(host)}"]
            command += [f"--num-cpus={settings['num_cpus']}", f"--object-store-memory={_OBJECT_STORE_BYTES}"]
            env = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": f"{settings['drain_s']:g}"}
            with path.open("wb") as log:
                subprocess.Popen(
                    self.command(host, command), env=self.environment() | env | (_HEAD_ENV if host == 1 else {}),
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                )  # fmt: skip
        began = time.monotonic()
        for host, path in logs.items():
            while b"Ray runtime started" not in path.read_bytes():
                waited = time.monotonic() - began
                if waited > _RAY_START_LIMIT_S or (waited > 5 and self._ray_start_of(host) is None):
                    raise HostsError(f"the Ray node of host {host} did not start; its last words are in {path}")
                time.sleep(0.1)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise HostsError(f"`{' '.join(command)}`: {done.stderr.strip()}")
    return done.stdout


def _launch(command: Sequence[str], what: str) -> None:
    """Starts a process that outlives this one, and waits until it says that it is ready."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None and process.stderr is not None
    with process.stdout, process.stderr:
        if process.stdout.readline() != b"ready\n":
            last_words = process.stderr.read().decode(errors="replace").strip()
            raise HostsError(f"{what} did not start: {last_words}; `down` cleans up")


def _end_all_in(namespace: str) -> None:
    _wait_for(lambda: not _kill(_processes(namespace)), _END_LIMIT_S, f"the end of all processes in {namespace}")


def _processes(namespace: str) -> list[Process]:
    """Returns the processes in a network namespace; `inner_pid` is 0 for those outside of the host's processes."""
    found = []
    done = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True)
    for pid in map(int, done.stdout.split()):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            status = Path(f"/proc/{pid}/status").read_text().splitlines()
            inner = next(line.split()[2:] for line in status if line.startswith("NSpid:"))
            found.append(Process(pid, int(inner[-1]) if inner else 0, command))
    return found


def _kill(processes: Sequence[Process]) -> Sequence[Process]:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
    return processes


def _wait_for(condition: Callable[[], bool], limit_s: float, what: str) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            raise HostsError(f"waited {limit_s:g} s for {what}")
        time.sleep(0.05)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Several hosts on one machine, to be disturbed. Needs root.")
    parser.add_argument("--state", type=Path, default=DEFAULT_STATE, help="directory of these hosts (%(default)s)")
    verbs = parser.add_subparsers(dest="verb", required=True)
    up = verbs.add_parser("up", help="make hosts with a Ray node each")
    up.add_argument("num_hosts", type=int)
    up.add_argument("--num-cpus", type=int, default=1, help="worker slots of a host (%(default)s)")
    up.add_argument("--drain-s", type=float, default=30.0, help="how long a drained node keeps its work (%(default)s)")
    texts = {
        "exec": "run a command on a host",
        "off": "switch a host off",
        "on": "start a host that is off, or its Ray node that has ended",
        "unplug": "pull a host's network cable",
        "plug": "put it in again",
        "slow": "delay and drop packets of a host",
        "drain": "announce the end of a host's Ray node, and end it",
    }
    for verb, text in texts.items():
        verbs.add_parser(verb, help=text).add_argument("host", type=int)
    verbs.choices["exec"].add_argument("command", nargs=argparse.REMAINDER)
    verbs.choices["slow"].add_argument("--delay-ms", type=float, required=True, help="in each direction; 0: as before")
    verbs.choices["slow"].add_argument("--loss", type=float, default=0.0, help="percent of packets (%(default)s)")
    verbs.add_parser("down", help="remove all of it but the shared directory")
    return parser


def main() -> None:
    """Entry of the command."""
    arguments = vars(_parser().parse_args())
    verb, hosts = arguments.pop("verb"), Hosts(arguments.pop("state"))
    try:
        if verb == "exec":
            if not arguments["command"]:
                raise HostsError("exec needs a command, for example `exec 1 ray status`")
            command, env = hosts.command(**arguments), hosts.environment()
            os.execvpe(command[0], command, env)
        getattr(hosts, verb)(**arguments)
        if verb == "up":
            print(f"Ray head on host 1: cluster.address={hosts.address}; run.output_dir={hosts.shared_dir}")
            print(f"on a host: {sys.executable} {__file__} --state {hosts._dir} exec 1 ray status")
    except HostsError as error:
        sys.exit(f"hosts: {error}")


if __name__ == "__main__":
    main()
