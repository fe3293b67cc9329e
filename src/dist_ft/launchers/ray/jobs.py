"""Submits runs as Ray jobs, and looks after them from any machine that reaches the cluster's dashboard.

The job's working directory holds only the config. dist-ft itself, models, data and secrets are those of the cluster's
machines: everybody who sees the dashboard can read the settings of a job.
"""

from __future__ import annotations

import functools
import hashlib
import tempfile
import time
from pathlib import Path

from dist_ft.config import check_config_elsewhere, dump_set_keys, load_config
from dist_ft.errors import UsageError
from dist_ft.launchers.job_output import find_result
from dist_ft.launchers.launcher import STOP_ENV, Ended, Job, RunAtWorkError, SubmitRequest, Submitted
from dist_ft.launchers.ray.output import follow, how_it_ended, wait_for_end
from dist_ft.launchers.ray.server import JobServer

_CONFIG_NAME = "config.yaml"


class RayLauncher:
    """Starts runs as jobs of one Ray cluster. A job's name is its submission id.

    Args:
        address: URL of the cluster's dashboard; None takes it from the environment.
    """

    def __init__(self, address: str | None = None) -> None:
        self._address = address

    @functools.cached_property
    def _server(self) -> JobServer:
        return JobServer(self._address)

    def submit(self, request: SubmitRequest) -> Submitted:
        """Start a run as a job; see `Launcher`."""
        config = load_config(request.config_path, [*request.overrides, "cluster.address=auto"])
        check_config_elsewhere(config)
        run_dir = config.run.address
        # One job a run on a cluster; across clusters the attempts in the run directory are the fence.
        for job in self._server.jobs():
            if not job.status.is_terminal() and (job.metadata or {}).get("run_dir") == run_dir:
                raise RunAtWorkError(
                    f"run {run_dir} is at work as job {job.submission_id}; follow it with `dist-ft logs "
                    f"{job.submission_id} --follow`, or stop it first: dist-ft stop {job.submission_id}",
                    job.submission_id,
                )
        submission_id = f"{config.run.name}-{time.strftime('%Y%m%d%H%M%S', time.gmtime())}"
        text = dump_set_keys(config)
        metadata = {
            "run_id": config.run.name,
            "run_dir": run_dir,
            "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
        }
        with tempfile.TemporaryDirectory(prefix="dist-ft-") as directory:
            (Path(directory) / _CONFIG_NAME).write_text(text, encoding="utf-8")
            self._server.submit(
                submission_id,
                # exec: a shell in between would be what the stop signal ends.
                entrypoint=" ".join(["exec dist-ft train", _CONFIG_NAME, "--json", *request.train_options]),
                runtime_env={"working_dir": directory, "env_vars": STOP_ENV},
                metadata=metadata,
            )
        return Submitted(submission_id, run_dir, self._server.address, tuple(self._server.warnings))

    def status(self, job: str) -> Job:
        """Return what the job server knows of a job."""
        details = self._server.info(job)
        metadata = details.metadata or {}
        return Job(
            job,
            details.status.value,
            details.status.is_terminal(),
            details.driver_exit_code,
            details.message,
            metadata.get("run_dir"),
            metadata.get("run_id"),
        )

    def logs(self, job: str) -> str:
        """Return what a job's driver has written so far."""
        return self._server.logs(job)

    def stop(self, job: str, timeout_s: float) -> str:
        """Stop a job after a checkpoint; see `Launcher`."""
        before = self._server.info(job)
        if before.status.is_terminal():
            raise UsageError(f"job {job} is not running: it is {before.status.value}; there is nothing to stop")
        self._server.stop(job)
        details = wait_for_end(self._server, job, timeout_s)
        return how_it_ended(details, find_result(self._server.logs(job))).describe_stop(job)

    def follow(self, job: str) -> Ended | None:
        """Show a job's output until it ends; see `output.follow`."""
        return follow(self._server, job)
