"""`dist-ft submit --to local`: a run goes on without its terminal, and ends as the same run of `dist-ft train`."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dist_ft.checkpoint.lineage import committed
from dist_ft.errors import UsageError
from dist_ft.launchers.launcher import Job, SubmitRequest
from dist_ft.launchers.local_keeper import ENDED, PROCESSES, Process
from dist_ft.layout import RunDir
from dist_ft.storage.publish import read_json, write_json
from dist_ft.storage.store import LocalStore
from tests.helpers.launchers import LocalPlace, wait_until_started
from tests.helpers.rows import last_rows
from tests.helpers.runs import CONFIG

LIMIT_S = 240.0


@pytest.fixture
def place(tmp_path: Path) -> Iterator[LocalPlace]:
    made = LocalPlace(tmp_path)
    yield made
    made.close()


@pytest.fixture
def submission(tmp_path: Path) -> SubmitRequest:
    path = tmp_path / "mine.yaml"
    path.write_text("model: {name: tiny-random}\ndata: {train: [{source: 'embedded:orders/train'}]}\n")
    return SubmitRequest(path, (f"run.output_dir={tmp_path}/runs",), preflight=False)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ended(place: LocalPlace, job: str) -> Job:
    wait_for(lambda: place.launcher.status(job).is_over)
    return place.launcher.status(job)


def processes(place: LocalPlace, job: str) -> tuple[Path, dict[str, Any]]:
    """The record of who works on a job, and its path."""
    path = place.orders.parent / "jobs" / job.removeprefix("local:") / PROCESSES
    return path, read_json(path)


def in_a_terminal_that_closes(command: list[str], env: dict[str, str] | None = None) -> str:
    """Runs a command as the leader of a session with a terminal; closes the terminal when it has ended."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvpe(command[0], command, env or dict(os.environ))
    said = b""
    with os.fdopen(terminal, "rb", buffering=0) as file:
        while True:
            try:
                part = file.read(1 << 16)
            except OSError:  # nobody has the other end any more
                break
            if not part:
                break
            said += part
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, said.decode()
    return said.decode()


_SUBMIT = """
import sys
from pathlib import Path
from dist_ft.launchers.launcher import SubmitRequest
from dist_ft.launchers.local import LocalLauncher
folder, config, override, train = sys.argv[1:]
request = SubmitRequest(Path(config), (override,), preflight=False)
print(LocalLauncher(Path(folder), [sys.executable, train]).submit(request).job)
"""


def test_a_run_has_no_terminal_and_outlives_that_of_its_submission(
    place: LocalPlace, submission: SubmitRequest, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", _SUBMIT, str(tmp_path / "jobs"), str(submission.config_path),
               submission.overrides[0], str(tmp_path / "train.py")]  # fmt: skip
    job = in_a_terminal_that_closes(command).strip()
    _, record = processes(place, job)
    for pid in (record["run"]["pid"], record["keeper"]["pid"]):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        assert fields[4] == "0", "no terminal"
        assert fields[3] != str(pid), "and as no leader of its session it never gets one"
        os.kill(pid, signal.SIGHUP)
    wait_until_started(place)
    assert place.launcher.status(job).job_state == "RUNNING"
    place.end(0)
    assert ended(place, job).exit_code == 0


@pytest.mark.parametrize(("code", "state", "exit_code"), [(0, "ENDED", 0), (3, "ENDED", 3), (1, "LOST", None)], ids=str)
def test_a_run_goes_on_without_its_keeper_and_its_result_says_how_it_ended(
    place: LocalPlace, submission: SubmitRequest, code: int, state: str, exit_code: int | None
) -> None:
    job = place.launcher.submit(submission).job
    wait_until_started(place)
    os.kill(processes(place, job)[1]["keeper"]["pid"], signal.SIGKILL)
    assert place.launcher.status(job).job_state == "RUNNING"
    place.end(code)
    found = ended(place, job)
    assert (found.job_state, found.exit_code) == (state, exit_code)
    if state == "LOST":
        followed = place.launcher.follow(job)
        assert followed.exit_code == 1
        assert followed.reason is not None and "--resume" in followed.reason


def test_a_run_that_is_killed_has_the_signal_as_its_exit_code(place: LocalPlace, submission: SubmitRequest) -> None:
    job = place.launcher.submit(submission).job
    wait_until_started(place)
    os.kill(place.pids[0], signal.SIGKILL)
    assert ended(place, job).exit_code == 128 + signal.SIGKILL


@pytest.mark.parametrize("change", ["start_ticks", "boot_id"])
def test_a_pid_that_was_given_to_another_process_is_neither_taken_for_the_run_nor_stopped(
    place: LocalPlace, submission: SubmitRequest, change: str
) -> None:
    job = place.launcher.submit(submission).job
    wait_until_started(place)
    path, record = processes(place, job)
    if change == "boot_id":
        record["boot_id"] = "another"
    else:
        for process in (record["keeper"], record["run"]):
            process["start_ticks"] -= 1
    write_json(path, record)
    assert place.launcher.status(job).job_state == "LOST"
    with pytest.raises(UsageError, match="nothing to stop"):
        place.launcher.stop(job, 1)
    assert Path(f"/proc/{place.pids[0]}").exists()
    place.end(0)
    wait_for(lambda: (path.parent / ENDED).exists())
    assert place.launcher.status(job).exit_code == 0


def test_a_job_of_another_machine_is_asked_for_there(place: LocalPlace, submission: SubmitRequest) -> None:
    job = place.launcher.submit(submission).job
    path, record = processes(place, job)
    write_json(path, record | {"host": "elsewhere"})
    with pytest.raises(UsageError, match="of the machine elsewhere; ask there"):
        place.launcher.status(job)


def test_of_many_submissions_at_once_one_is_taken(place: LocalPlace, submission: SubmitRequest) -> None:
    def submit(_: int) -> str | None:
        try:
            return place.launcher.submit(submission).job
        except UsageError:
            return None

    with ThreadPoolExecutor(4) as pool:
        taken = [job for job in pool.map(submit, range(4)) if job]
    assert len(taken) == 1
    wait_until_started(place)
    assert place.num_started == 1


def test_only_the_user_can_read_what_a_job_writes(place: LocalPlace, submission: SubmitRequest) -> None:
    job = place.launcher.submit(submission).job
    assert processes(place, job)[0].parent.stat().st_mode & 0o077 == 0


def test_a_run_that_is_told_to_end_by_the_machine_is_told_once(place: LocalPlace, submission: SubmitRequest) -> None:
    """SIGTERM to the keeper, as at a shutdown, is one to the run."""
    job = place.launcher.submit(submission).job
    wait_until_started(place)
    os.kill(processes(place, job)[1]["keeper"]["pid"], signal.SIGTERM)
    assert ended(place, job).exit_code == 128 + signal.SIGTERM


# The command itself, and real runs.


class Machine:
    """The command of a user of this machine, who has a cache and runs of his own."""

    def __init__(self, cli: str, address: str, folder: Path) -> None:
        self._cli = cli
        self.runs = folder / "runs"
        self.env = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
        self.settings = [
            f"run.output_dir={self.runs}", f"cluster.address={address}", "data.eval=null", "eval.metrics=[]",
            "monitor.wandb=disabled", "checkpoint.every_steps=20", "schedule={kind: constant, warmup_ratio: 0}",
        ]  # fmt: skip

    def words(self, verb: str, *arguments: str) -> list[str]:
        config = [str(CONFIG), *self.settings] if verb in ("submit", "train") else []
        return [self._cli, verb, *config, *arguments]

    def call(self, verb: str, *arguments: str) -> tuple[int, str, str]:
        done = subprocess.run(
            self.words(verb, *arguments), capture_output=True, text=True, timeout=240, check=False,
            stdin=subprocess.DEVNULL, env=self.env,
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    def job_of(self, said: str) -> str:
        """The job that a submission has named."""
        return said.split("submitted ")[1].split(";")[0]

    def close(self) -> None:
        """Ends the runs that a failed test has left."""
        for path in Path(self.env["XDG_CACHE_HOME"]).glob(f"dist-ft/jobs/*/{PROCESSES}"):
            run = Process(**read_json(path)["run"])
            if run.is_alive:
                os.kill(run.pid, signal.SIGKILL)


@pytest.fixture
def machine(cli: str, ray_address: str, tmp_path: Path) -> Iterator[Machine]:
    made = Machine(cli, ray_address, tmp_path)
    yield made
    made.close()


def outcome(run_dir: RunDir) -> tuple[list[Any], list[str]]:
    rows = [(step, row["digest"], row["loss"]) for step, row in sorted(last_rows(run_dir.metrics).items())]
    return rows, [file.xxh3 for file in committed(LocalStore(run_dir.path))[-1].files]


@pytest.mark.timeout(600)  # three runs one after the other
def test_a_run_whose_terminal_closes_is_stopped_resumed_and_ends_as_one_of_train(machine: Machine) -> None:
    parts, whole = RunDir(machine.runs / "parts"), RunDir(machine.runs / "whole")
    local = ("--to", "local", "--no-preflight", "run.name=parts")
    said = in_a_terminal_that_closes(machine.words("submit", *local, "train.max_steps=5000"), machine.env)
    job = machine.job_of(said)
    wait_for(lambda: parts.run_json.exists() and read_json(parts.run_json)["step"] >= 3)

    code, _, err = machine.call("submit", *local, "--resume")
    assert code == 2 and job in err, err
    code, out, err = machine.call("stop", job)
    assert code == 0, err
    num_steps = read_json(parts.run_json)["step"]
    assert f"stopped at step {num_steps}" in out
    found = json.loads(machine.call("status", job, "--json")[1])
    assert (found["job_state"], found["exit_code"], found["run"]["state"]) == ("ENDED", 3, "stopped")
    assert machine.call("logs", job, "--follow")[0] == 3

    length = f"train.max_steps={num_steps + 3}"
    code, out, err = machine.call("submit", *local, length, "--resume", "--follow")
    assert code == 0, out + err
    assert f"completed after {num_steps + 3} steps: {parts.path}" in out
    assert read_json(parts.run_json)["attempt"] == 2

    code, _, err = machine.call("train", "run.name=whole", length)
    assert code == 0, err
    assert outcome(parts) == outcome(whole)


def test_a_name_that_is_taken_and_a_job_that_is_not_there_are_one_line(machine: Machine) -> None:
    (machine.runs / "taken").mkdir(parents=True)
    code, out, err = machine.call("submit", "--to", "local", "run.name=taken")
    assert (code, out) == (2, "")
    assert "exists; continue it with --resume" in err and len(err.splitlines()) == 1
    for verb in ("status", "logs", "stop"):
        code, out, err = machine.call(verb, "local:nobody")
        assert (code, out) == (2, "")
        assert "local:nobody: there is no such job" in err and len(err.splitlines()) == 1


def test_an_error_of_the_run_is_the_exit_code_of_who_follows(machine: Machine) -> None:
    bad = "method={kind: lora, target_modules: [nothing]}"
    code, out, _ = machine.call("submit", "--to", "local", "--no-preflight", "run.name=bad", bad, "--follow")
    assert code == 2
    assert "error: " in out and "nothing" in out
    assert not (machine.runs / "bad").exists()
