"""Submits runs as Slurm jobs, and looks after them through Slurm's commands. A job is called `slurm:ID`.

Fills in a batch script; what happens on the nodes stands there (cluster/slurm/job.sbatch).
"""

from __future__ import annotations

import re
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from dist_ft.config import Config, dump_set_keys
from dist_ft.errors import ConfigError, DistFtError, UsageError
from dist_ft.launchers.command import run_command
from dist_ft.launchers.job_output import FileOutput
from dist_ft.launchers.launcher import Ended, Job, SubmitRequest, Submitted
from dist_ft.machine import worker_resources, workers_on

PREFIX = "slurm:"
_END = "@END@"
_PLACES = ("@BIN@", "@CONFIG@", "@OPTIONS@")
_LIMIT_S = 60.0
_DIRECTIVE = re.compile(r"^#SBATCH\s+(--[a-z-]+)(?:[= ](\S+))?", re.MULTILINE)
_LIVE = frozenset({"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "RESIZING", "STAGE_OUT",
                   "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "SIGNALING", "STOPPED"})  # fmt: skip


def render(template: str, config: Config, options: Sequence[str], bin_dir: Path) -> str:
    """Return the batch script of a run.

    Args:
        template: Such as cluster/slurm/job.sbatch.
        config: As `load_config` returns it, paths absolute.
        options: Of `dist-ft train`.
        bin_dir: Where `dist-ft`, `ray` and `python` are on the nodes.

    Raises:
        UsageError: The template is not one.
    """
    for place in _PLACES:
        if template.count(place) != 1:
            raise UsageError(f"the template has {template.count(place)} {place}, expected one; begin with "
                             "cluster/slurm/job.sbatch")  # fmt: skip
    text = dump_set_keys(config).rstrip("\n")
    if _END in text:
        raise ConfigError(f"the config holds {_END}, which ends it in a batch script; write that differently")
    values = {"@BIN@": shlex.quote(str(bin_dir)), "@OPTIONS@": shlex.join(options), "@CONFIG@": text}
    # The config last: what it holds is not looked at again.
    for place, value in values.items():
        template = template.replace(place, value)
    return template


def room(template: str, more: Sequence[str]) -> tuple[str, dict[str, float]]:
    """Return the value of `--nodes` of a job, and the CPUs and GPUs of a node; 0 if unknown.

    Args:
        template: Its `#SBATCH` lines count.
        more: Options of sbatch that come before them.
    """
    written = dict(_DIRECTIVE.findall(template))
    for option in more:
        name, _, value = option.partition("=")
        written[name] = value
    gpus = written.get("--gpus-per-node") or written.get("--gres", "").removeprefix("gpu:")
    return written.get("--nodes", "1"), {
        "CPU": float(written.get("--cpus-per-task") or 0),
        "GPU": float(found[0]) if (found := re.findall(r"\d+$", gpus)) else 0.0,
    }


def check_room(config: Config, nodes: str, each: dict[str, float]) -> None:
    """Refuses a job that is too small for the run, which would otherwise show only after the queue.

    Raises:
        ConfigError: Its nodes have too little for the fewest workers.
    """
    worker = worker_resources(config.cluster.resources_per_worker, has_gpu=each["GPU"] > 0)
    per_node = workers_on(each, {name: amount for name, amount in worker.items() if each.get(name)})  # what is known
    most = int(nodes.rpartition("-")[2]) if nodes.rpartition("-")[2].isdigit() else 0
    if per_node is not None and most and most * per_node < config.cluster.min_workers:
        raise ConfigError(
            f"cluster.num_workers={config.cluster.num_workers}: the job has {nodes} nodes of {per_node} workers; "
            "pass --sbatch=--nodes=N, or change the template"
        )


class SlurmLauncher:
    """Starts runs as Slurm jobs. A job's name is `slurm:ID`.

    Args:
        template: Batch script such as cluster/slurm/job.sbatch; only `submit` needs one.
        options: Options of sbatch that count before those of the template.
        poll_s: Seconds between two requests for a job's state.
    """

    def __init__(self, template: Path | None = None, options: Sequence[str] = (), poll_s: float = 2.0) -> None:
        self._template = template
        self._options = options
        self._poll_s = poll_s

    def submit(self, request: SubmitRequest) -> Submitted:
        """Hands a run to Slurm; see `Launcher`."""
        if self._template is None:
            raise UsageError("--to slurm needs --template FILE, such as cluster/slurm/job.sbatch")
        # `auto` only says that this machine is not the one: the job names its own Ray.
        config = request.load_checked("cluster.address=auto")
        try:
            text = self._template.read_text(encoding="utf-8")
        except OSError as error:
            raise UsageError(
                f"--template {self._template}: {error.strerror}; such as cluster/slurm/job.sbatch"
            ) from error
        check_room(config, *room(text, self._options))
        script = render(text, config, ["--json", *request.train_options], Path(sys.executable).parent)
        run_dir = config.run.address
        # One job a run; elsewhere the attempts in the run directory are the fence.
        for line in _slurm("squeue", "--me", "--noheader", "--format=%i %k").splitlines():
            number, _, comment = line.strip().partition(" ")
            if comment == run_dir:
                job = f"{PREFIX}{number}"
                raise UsageError(f"run {run_dir} is at work or waiting as {job}; stop it first: dist-ft stop {job}")
        own = ["--parsable", f"--job-name={config.run.name}", f"--comment={run_dir}"]
        printed = _slurm("sbatch", *own, *self._options, stdin=script)
        return Submitted(f"{PREFIX}{printed.strip().partition(';')[0]}", run_dir)

    def status(self, job: str) -> Job:
        """Return what `scontrol` knows of a job."""
        number = _number(job)
        try:
            shown = _slurm("scontrol", "show", "job", number)
        except DistFtError as error:
            if "Invalid job id" not in str(error):
                raise
            raise UsageError(
                f"{job}: Slurm knows no such job, or has forgotten it; `sacct -j {number}` may tell"
            ) from error
        state = _field(shown, "JobState", r"\w+") or ""
        code, signal = map(int, (_field(shown, "ExitCode", r"\d+:\d+") or "0:0").split(":"))
        is_over = state not in _LIVE
        return Job(
            job,
            state,
            is_over,
            code or (128 + signal if signal else 0) if is_over or state == "COMPLETING" else None,
            _field(shown, "Reason", r"\S+"),
            _field(shown, "Comment", r".+"),
            log=_field(shown, "StdOut", r".+"),
            restarts=int(_field(shown, "Restarts", r"\d+") or 0),
        )

    def logs(self, job: str) -> str:
        """Return the output so far, if this machine sees the file."""
        path = Path(self.status(job).log or "")
        try:
            return path.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise UsageError(f"{job}: its output {path} cannot be read here (yet): {error.strerror}") from error

    def follow(self, job: str) -> Ended:
        """Print the output of all tries until the job ends; see `Launcher`."""
        said, restarts, output = None, None, FileOutput()
        while True:
            found = self.status(job)
            if found.job_state != said:
                said = found.job_state
                print(f"{job}: {said} {found.message or ''}".rstrip(), flush=True)
            output.read(Path(found.log or ""))
            if restarts not in (None, found.restarts):
                output.result = None  # that was the result of an earlier try
            restarts = found.restarts
            if found.is_over:
                output.close()
                if found.exit_code == 0 and said != "COMPLETED":  # cancelled in the queue, or its node failed
                    return Ended(1, output.result, f"{job} is {said}; --resume goes on after the last checkpoint")
                return Ended(found.exit_code or 0, output.result)
            time.sleep(self._poll_s)

    def stop(self, job: str, timeout_s: float) -> str:
        """Stop a job after a checkpoint; see `Launcher`."""
        found = self.status(job)
        if found.is_over:
            raise UsageError(f"{job} is not running: it is {found.job_state}; there is nothing to stop")
        if found.job_state == "PENDING":
            _slurm("scancel", _number(job))
            return f"{job} was waiting and is cancelled"
        _slurm("scancel", "--batch", "--signal=INT", _number(job))
        deadline = time.monotonic() + timeout_s
        while not (found := self.status(job)).is_over and found.job_state != "COMPLETING":
            if time.monotonic() > deadline:
                raise DistFtError(f"{job} is still {found.job_state} after {timeout_s:g} s")
            time.sleep(self._poll_s)
        line = f"{job}: exit code {found.exit_code}, run directory {found.run_dir}"
        if found.exit_code not in (0, 3):
            raise DistFtError(line)
        return line


def _slurm(*command: str, stdin: str | None = None) -> str:
    return run_command(
        command,
        shown=command[0],
        absent="submit from a login node of the Slurm cluster",
        question="is slurmctld there?",
        limit_s=_LIMIT_S,
        stdin=stdin,
    )


def _number(job: str) -> str:
    number = job.removeprefix(PREFIX)
    if not number.isdigit():
        raise UsageError(f"{job} is not the id of a Slurm job, such as {PREFIX}17")
    return number


def _field(shown: str, name: str, pattern: str) -> str | None:
    found = re.search(rf"(?:^|\s){name}=({pattern})", shown)
    return found[1].strip() if found else None
