"""Three real hosts on this machine, for the whole session. Needs root; `make netns` runs what is here."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.local import hosts as hosts_module
from cluster.local.hosts import Hosts, Process, why_not
from dist_ft.storage.publish import read_json
from tests.helpers.rows import read_rows
from tests.helpers.runs import Run

# Enough that the last of a job's five mishaps comes before the last step on an idle machine, too.
STEPS = 240
# The rate of the smoke config (3e-3) makes rounding grow tenfold every five steps; after 40 steps no two world sizes
# agree to 1e-5. At 1e-3 they do until step 85, at 3e-4 to the end.
SETTINGS = (f"train.max_steps={STEPS}", "optimizer.lr=3e-4", "checkpoint.every_steps=5", "failure.backoff_s=0.1")
_TIMES = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_TIMES] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for line in config.stash[_TIMES]:
        terminalreporter.write_line(line)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    reason = why_not() if here else None
    for item in here:
        item.add_marker(pytest.mark.timeout(600))
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=f"several hosts cannot be made: {reason}"))


class Submitted(Run):
    """A run that `dist-ft submit --follow` follows."""

    command = ("submit", "--to", "ray", "--address", "http://127.0.0.1:8265", "--follow")

    def finish(self, limit_s: float = 200.0) -> tuple[int, dict[str, Any], str]:
        """Returns exit code, run.json and all that was shown."""
        out, err = self.process.communicate(timeout=limit_s)
        record = read_json(self.dir.run_json)
        return self.process.returncode, {"error": None, **record}, out + err


@dataclass
class Cluster:
    """The hosts, runs on them, and what is said at the end of the session."""

    hosts: Hosts
    say: Callable[[str], None]
    cli: str
    runs: list[Run]

    def train(self, name: str, *overrides: str) -> Run:
        """Starts `dist-ft train` on host 1."""
        settings = (*SETTINGS, *overrides)
        run = Run(self.cli, self.hosts.shared_dir, self.hosts.address, f"{name}-{time.time_ns()}", *settings)
        self.runs.append(run)
        return run

    def submit(self, name: str, *overrides: str) -> Run:
        """Submits the same run, on host 1, as a job of its Ray, and follows it."""
        run = Submitted(self.cli, self.hosts.shared_dir, "auto", f"{name}-{time.time_ns()}", *SETTINGS, *overrides)
        self.runs.append(run)
        return run

    def wait_for_new_step(self, run: Run, what: str, limit_s: float = 240.0) -> float:
        """Waits for a step that was never made before, by another attempt, and notes how long that took."""
        began, seen = time.monotonic(), read_rows(run.dir.metrics)
        last, attempt = max(row["step"] for row in seen), seen[-1]["attempt"]
        while time.monotonic() - began < limit_s:
            rows = read_rows(run.dir.metrics)
            if rows[-1]["step"] > last and rows[-1]["attempt"] > attempt:
                took = time.monotonic() - began
                self.say(f"{what}: {took:.1f} s to the next new step ({last + 1}, world size {rows[-1]['world_size']})")
                return took
            assert run.process.poll() is None, run.process.communicate()
            time.sleep(0.1)
        raise AssertionError(f"no step after {last} within {limit_s:.0f} s of: {what}")

    def wait_until_all_ended(self, host: int, known: list[Process], limit_s: float) -> float:
        """Waits until processes of a host have ended by themselves; names those that live on."""
        began, pids = time.monotonic(), {process.pid for process in known}
        while left := [process for process in self.hosts.processes(host) if process.pid in pids]:
            assert time.monotonic() - began < limit_s, f"live on after {limit_s:.0f} s on host {host}: {left}"
            time.sleep(0.2)
        return time.monotonic() - began


@pytest.fixture(scope="session")
def three_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hosts, str]]:
    """Three hosts with a worker slot each, and a `dist-ft` that runs on the first."""
    hosts = Hosts(tmp_path_factory.mktemp("hosts"))
    cli = tmp_path_factory.mktemp("bin") / "dist-ft"
    command = f"{sys.executable} {hosts_module.__file__} --state {hosts.shared_dir.parent}"
    cli.write_text(f'#!/bin/sh\nexec {command} exec 1 dist-ft "$@"\n')
    cli.chmod(0o755)
    try:
        hosts.up(3, drain_s=60, with_dashboard=True)
        yield hosts, str(cli)
    finally:
        hosts.down()


@pytest.fixture
def cluster(three_hosts: tuple[Hosts, str], request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """Three hosts that are well. Only host 3 may be disturbed; it is a new one afterwards."""
    hosts, cli = three_hosts
    cluster = Cluster(hosts, request.config.stash[_TIMES].append, cli, [])
    yield cluster
    for run in cluster.runs:
        if run.process.poll() is None:  # a test that failed; ending nsenter does not end what it runs
            for process in hosts.processes(1):
                if "dist-ft train" in process.command:
                    os.kill(process.pid, signal.SIGKILL)
            run.process.communicate(timeout=30)
    hosts.plug(3)
    hosts.slow(3, 0)
    if hosts.is_on(3):
        hosts.off(3)
    hosts.on(3)


@pytest.fixture(scope="session")
def undisturbed(three_hosts: tuple[Hosts, str], cli: str) -> Run:
    """The run that the others are compared with: this machine, one worker, a Ray of its own."""
    hosts, _ = three_hosts
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as on the hosts
    run = Run(cli, hosts.shared_dir, "null", "whole", *SETTINGS, "cluster.num_workers=1")
    try:
        code, result, err = run.finish(500)
    finally:
        run.process.kill()
    assert (code, result["attempts"]) == (0, 1), err
    return run
