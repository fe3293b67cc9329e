"""Runs as Ray jobs: starts them, and looks after them from anywhere that reaches the cluster's dashboard.

The job gets the resolved config in its working directory and nothing else: dist-ft itself, models and data are those of
the cluster's machines. Secrets are theirs, too; the settings of a job can be read by everybody who sees the dashboard.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from dist_ft.config import Config, check_config_elsewhere, dump_set_keys, load_config
from dist_ft.errors import DistFtError, UsageError
from dist_ft.launchers.launcher import STOP_ENV, SubmitRequest
from dist_ft.launchers.ray.output import Ended, find_result, follow, how_it_ended, wait_for_end
from dist_ft.launchers.ray.server import JobServer
from dist_ft.run.status import read_if_seen, render_status

_CONFIG_NAME = "config.yaml"
_LIVE = ("PENDING", "RUNNING")


def submit(request: SubmitRequest, address: str | None) -> Ended | None:
    """Starts a run as a job of the cluster whose dashboard is at `address`; prints the submission id.

    Returns:
        How the run ended; None when it is not followed to its end.

    Raises:
        UserError: Bad config, no such cluster, a refused token, or the run goes on there already: nothing was started.
    """
    config = load_config(request.config_path, [*request.overrides, "cluster.address=auto"])
    check_config_elsewhere(config)
    server = JobServer(address)
    for line in server.warnings:
        print(f"warning: {line}", file=sys.stderr)
    run_dir = config.run.address
    _refuse_second(server, run_dir)
    submission_id = f"{config.run.name}-{time.strftime('%Y%m%d%H%M%S', time.gmtime())}"
    _start(server, submission_id, config, run_dir, request)
    _say_commands(server, submission_id, run_dir)
    return follow(server, submission_id) if request.follow else None


def read_job(server: JobServer, submission_id: str) -> dict[str, Any]:
    """Returns `{submission_id, job_state, exit_code, message, run_id, run_dir, run}`.

    `run` is what `dist-ft status` says of the run directory, or None where that cannot be seen from here.
    """
    details = server.info(submission_id)
    metadata = details.metadata or {}
    run_dir = metadata.get("run_dir")
    return {
        "submission_id": submission_id,
        "job_state": details.status.value,
        "exit_code": details.driver_exit_code,
        "message": details.message,
        "run_id": metadata.get("run_id"),
        "run_dir": run_dir,
        "run": read_if_seen(run_dir),
    }


def render_job(job: dict[str, Any]) -> str:
    """Returns what `read_job` found as a few lines of text."""
    code = "" if job["exit_code"] is None else f", exit code {job['exit_code']}"
    lines = [f"{job['submission_id']}: job {job['job_state']}{code}"]
    if job["run"] is not None:
        lines.append(render_status(job["run"]))
    else:
        lines.append(f"  run directory {job['run_dir']}, not visible from here (or not there yet)")
    return "\n".join(lines)


def stop(server: JobServer, submission_id: str, timeout_s: float) -> str:
    """Has a job checkpoint and stop, waits for it, and returns a line that says how it ended.

    Raises:
        UsageError: There is no such job, or it has ended already.
        DistFtError: It did not end in time, or without a result.
    """
    before = server.info(submission_id)
    if before.status.is_terminal():
        raise UsageError(f"job {submission_id} is not running: it is {before.status.value}; there is nothing to stop")
    server.stop(submission_id)
    details = wait_for_end(server, submission_id, timeout_s)
    ended = how_it_ended(details, find_result(server.logs(submission_id)))
    if ended.result is None:
        raise DistFtError(f"job {submission_id}: {ended.reason}")
    line = f"{ended.result.state} at step {ended.result.steps}: {ended.result.run_dir}"
    if ended.exit_code not in (0, 3):
        raise DistFtError(line)
    return line


def _refuse_second(server: JobServer, run_dir: str) -> None:
    """One job a run on a cluster; across clusters the attempts in the run directory are the fence."""
    for job in server.jobs():
        if job.status.value in _LIVE and (job.metadata or {}).get("run_dir") == run_dir:
            raise UsageError(
                f"run {run_dir} is at work as job {job.submission_id}; follow it with `dist-ft logs "
                f"{job.submission_id} --follow`, or stop it first: dist-ft stop {job.submission_id}"
            )


def _start(server: JobServer, submission_id: str, config: Config, run_dir: str, request: SubmitRequest) -> None:
    text = dump_set_keys(config)
    metadata = {
        "run_id": config.run.name,
        "run_dir": run_dir,
        "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    with tempfile.TemporaryDirectory(prefix="dist-ft-") as directory:
        (Path(directory) / _CONFIG_NAME).write_text(text, encoding="utf-8")
        server.submit(
            submission_id,
            # exec: a shell in between would be what the stop signal ends.
            entrypoint=" ".join(["exec dist-ft train", _CONFIG_NAME, "--json", *request.train_options]),
            runtime_env={"working_dir": directory, "env_vars": STOP_ENV},
            metadata=metadata,
        )


def _say_commands(server: JobServer, submission_id: str, run_dir: str) -> None:
    print(
        f"submitted {submission_id} to {server.address}; run directory {run_dir}\n"
        f"  dist-ft status|logs|stop {submission_id} --address {server.address}",
        flush=True,
    )
