"""Starts runs on this machine that go on after the terminal is closed. A job is called `local:ID`.

Each job has a folder in the user's cache with its config. `local_keeper` adds the output and the processes.
"""

from __future__ import annotations

import socket
import subprocess
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from dist_ft.config import dump_set_keys
from dist_ft.errors import DistFtError, UsageError
from dist_ft.launchers.job_output import FileOutput, find_result
from dist_ft.launchers.launcher import Ended, Job, RunAtWorkError, SubmitRequest, Submitted
from dist_ft.launchers.local_keeper import ENDED, OUTPUT, PROCESSES, Process, Processes, boot_id
from dist_ft.layout import user_cache_dir
from dist_ft.machine import OWN_PYTHON
from dist_ft.storage.publish import read_json, write_json

PREFIX = "local:"
_RECORD, _CONFIG = "job.json", "config.yaml"
_PYTHON = (*OWN_PYTHON, "-m")
_START_LIMIT_S = 60.0
_NUM_NAMED = 5
_LOST = "its process is gone without an exit code: killed, or the machine was restarted; go on with --resume"


class LocalLauncher:
    """Starts runs as processes of this machine, each in a session of its own.

    Args:
        folder: Where jobs are kept; None is the user's cache.
        train: The command `dist-ft train`.
        poll_s: Seconds between two looks at a job.
    """

    def __init__(
        self, folder: Path | None = None, train: Sequence[str] = (*_PYTHON, "dist_ft.cli", "train"), poll_s: float = 0.5
    ) -> None:
        self._folder = folder or user_cache_dir() / "jobs"
        self._train = train
        self._poll_s = poll_s

    def submit(self, request: SubmitRequest) -> Submitted:
        """Start a run in the background; see `Launcher`."""
        config = request.load_checked()
        run_dir = config.run.address
        self._folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self._folder / "lock"):  # two submissions at once must see one another
            for job in self._jobs():
                if job.run_dir == run_dir and not job.is_over:
                    raise RunAtWorkError(
                        f"run {run_dir} is at work as {job.submission_id}; follow it with `dist-ft logs "
                        f"{job.submission_id} --follow`, or stop it first: dist-ft stop {job.submission_id}",
                        job.submission_id,
                    )
            name = f"{config.run.name}-{time.strftime('%Y%m%d%H%M%S', time.gmtime())}"
            if (self._folder / name).exists():  # the same name in another directory, within a second
                name = f"{name}-{uuid.uuid4().hex[:4]}"
            folder = self._folder / name
            folder.mkdir(mode=0o700)
            (folder / _CONFIG).write_text(dump_set_keys(config), encoding="utf-8")
            write_json(folder / _RECORD, {"run_id": config.run.name, "run_dir": run_dir})
            train = [*self._train, str(folder / _CONFIG), "--json", *request.train_options]
            command = [*_PYTHON, "dist_ft.launchers.local_keeper", str(folder), *train]
            try:
                done = subprocess.run(
                    command, capture_output=True, check=False, start_new_session=True, timeout=_START_LIMIT_S
                )
            except subprocess.TimeoutExpired as error:
                raise DistFtError(
                    f"the run was not started within {_START_LIMIT_S:g} s; `dist-ft status {PREFIX}{name}` tells "
                    "whether it was later"
                ) from error
        if done.returncode != 0:
            said = done.stderr.decode(errors="replace") + _text(folder / OUTPUT)
            reason = (said.strip() or "nobody says why").splitlines()[-1]
            raise DistFtError(f"the run could not be started: {reason}")
        return Submitted(f"{PREFIX}{name}", run_dir)

    def status(self, job: str) -> Job:
        """Return the state of a job, from its folder and the machine's processes."""
        return self._look(self._folder_of(job))

    def logs(self, job: str) -> str:
        """Return what a job has written so far."""
        return _text(self._folder_of(job) / OUTPUT)

    def follow(self, job: str) -> Ended:
        """Print the output of a job until it ends; see `Launcher`."""
        folder = self._folder_of(job)
        output = FileOutput()
        while True:
            found = self._look(folder)
            output.read(folder / OUTPUT)
            if found.is_over:
                output.close()
                return Ended(1 if found.exit_code is None else found.exit_code, output.result, found.message)
            time.sleep(self._poll_s)

    def stop(self, job: str, timeout_s: float) -> str:
        """Stop a job after a checkpoint; see `Launcher`."""
        folder = self._folder_of(job)
        found = self._look(folder)
        if found.is_over:
            raise UsageError(f"{job} is not running: it is {found.job_state}; there is nothing to stop")
        processes = _processes(folder)
        assert processes is not None  # or the job would be lost
        processes.run.interrupt()
        deadline = time.monotonic() + timeout_s
        while not (found := self._look(folder)).is_over:
            if time.monotonic() > deadline:
                raise DistFtError(f"{job} is still at work after {timeout_s:g} s")
            time.sleep(self._poll_s)
        code = 1 if found.exit_code is None else found.exit_code
        return Ended(code, find_result(self.logs(job)), found.message).describe_stop(job)

    def _jobs(self) -> list[Job]:
        """Return all jobs, the newest first."""
        records = sorted(self._folder.glob(f"*/{_RECORD}"), key=lambda path: path.stat().st_mtime, reverse=True)
        return [self._look(record.parent) for record in records]

    def _folder_of(self, job: str) -> Path:
        name = job.removeprefix(PREFIX)
        folder = self._folder / name
        if folder.parent == self._folder and (folder / _RECORD).is_file():
            processes = _processes(folder)
            if processes is not None and processes.host != socket.gethostname():
                raise UsageError(f"{job} is a job of the machine {processes.host}; ask there")
            return folder
        known = [found.submission_id for found in self._jobs()[:_NUM_NAMED]]
        raise UsageError(
            f"{job}: there is no such job; "
            + (f"the last ones are {', '.join(known)}" if known else f"none was submitted here ({self._folder})")
        )

    def _look(self, folder: Path) -> Job:
        record = read_json(folder / _RECORD)
        job = f"{PREFIX}{folder.name}"
        processes = _processes(folder)
        # The keeper is looked at before the record that it writes last. Another boot has other processes.
        is_at_work = (
            processes is not None
            and processes.boot_id == boot_id()
            and (processes.keeper.is_alive or processes.run.is_alive)
        )
        ended = read_json(folder / ENDED) if (folder / ENDED).exists() else None
        code, state, message = None, "RUNNING", None
        if ended is not None:
            code, state = int(ended["exit_code"]), "ENDED"
        elif not is_at_work:
            result = find_result(_text(folder / OUTPUT))
            code, state = (None, "LOST") if result is None else (result.exit_code, "ENDED")
            message = _LOST if result is None else None
        return Job(
            job, state, state != "RUNNING", code, message, record["run_dir"], record["run_id"], str(folder / OUTPUT)
        )


def _processes(folder: Path) -> Processes | None:
    try:
        found = read_json(folder / PROCESSES)
    except FileNotFoundError:
        return None
    keeper, run = (Process(found[key]["pid"], found[key]["start_ticks"]) for key in ("keeper", "run"))
    return Processes(found["host"], found["boot_id"], keeper, run)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
