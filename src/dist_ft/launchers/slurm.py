"""Runs as Slurm jobs: fills in the batch script, submits, follows and stops. Talks to Slurm by its commands alone.

What happens on the nodes is the script's affair: cluster/slurm/job.sbatch. A job is called `slurm:ID`.
"""

from __future__ import annotations

import re
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_ft.config import (
    Config,
    check_config,
    dump_set_keys,
    load_config,
    with_absolute_paths,
    with_adapter_settings,
)
from dist_ft.errors import ConfigError, DistFtError, UsageError
from dist_ft.launchers.command import run_command
from dist_ft.launchers.launcher import SubmitRequest
from dist_ft.machine import worker_resources, workers_on
from dist_ft.run.place import check_new_run
from dist_ft.run.status import read_if_seen, render_status

PREFIX = "slurm:"
_END = "@END@"
_PLACES = ("@BIN@", "@CONFIG@", "@OPTIONS@")
_LIMIT_S = 60.0
_POLL_S = 2.0
_DIRECTIVE = re.compile(r"^#SBATCH\s+(--[a-z-]+)(?:[= ](\S+))?", re.MULTILINE)
_LIVE = frozenset({"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "RESIZING", "STAGE_OUT",
                   "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "SIGNALING", "STOPPED"})  # fmt: skip


def render(template: str, config: Config, options: Sequence[str], bin_dir: Path) -> str:
    """Returns the batch script of a run.

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
    """Returns the nodes of a job as `--nodes` has them, and what a node has: `{CPU, GPU}`, 0 where that is not said.

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
    """Refuses a job that could never hold the run, which would be known only when it leaves the queue.

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


def submit(request: SubmitRequest, template: Path, more: Sequence[str] = ()) -> int:
    """Hands a run to Slurm and prints the id of its job; returns the exit code of design section 7.

    Args:
        request: What to run; without `follow` the code is 0 once it is submitted.
        template: Such as cluster/slurm/job.sbatch.
        more: Options of sbatch that count before those of the template.

    Raises:
        UserError: Nothing was submitted.
        DistFtError: Slurm refuses it.
    """
    # `auto` only says that this machine is not the one: the job names its own Ray.
    config = load_config(request.config_path, [*request.overrides, "cluster.address=auto"])
    check_config(config)
    with_adapter_settings(config)  # a contradiction is told here; the keys themselves are settled there
    config = with_absolute_paths(config)
    if not request.resume:
        check_new_run(config)
    text = _read(template)
    check_room(config, *room(text, more))
    script = render(text, config, ["--json", *request.train_options], Path(sys.executable).parent)
    run_dir = config.run.address
    _refuse_second(run_dir)
    own = ["--parsable", f"--job-name={config.run.name}", f"--comment={run_dir}"]
    job = f"{PREFIX}{_slurm('sbatch', *own, *more, stdin=script).strip().partition(';')[0]}"
    print(f"submitted {job}; run directory {run_dir}\n  dist-ft status|logs|stop {job}", flush=True)
    return follow(job) if request.follow else 0


def read_job(job: str) -> dict[str, Any]:
    """Returns `{submission_id, job_state, exit_code, message, restarts, log, run_dir, run}` of a job.

    Raises:
        UsageError: Slurm does not know it (any more).
    """
    number = _number(job)
    try:
        shown = _slurm("scontrol", "show", "job", number)
    except DistFtError as error:
        if "Invalid job id" not in str(error):
            raise
        raise UsageError(
            f"{job}: Slurm knows no such job, or has forgotten it; `sacct -j {number}` may tell"
        ) from error
    run_dir = _field(shown, "Comment", r".+")
    code, signal = map(int, (_field(shown, "ExitCode", r"\d+:\d+") or "0:0").split(":"))
    return {
        "submission_id": job,
        "job_state": _field(shown, "JobState", r"\w+"),
        "exit_code": code or (128 + signal if signal else 0),
        "message": _field(shown, "Reason", r"\S+"),
        "restarts": int(_field(shown, "Restarts", r"\d+") or 0),
        "log": _field(shown, "StdOut", r".+"),
        "run_dir": run_dir,
        "run": read_if_seen(run_dir),
    }


def render_job(job: dict[str, Any]) -> str:
    """Returns what `read_job` found as a few lines of text."""
    is_over = job["job_state"] not in _LIVE
    how = f"exit code {job['exit_code']}" if is_over else f"{job['message']}, requeued {job['restarts']} times"
    lines = [f"{job['submission_id']}: {job['job_state']} ({how}); output in {job['log']}"]
    return "\n".join([*lines, render_status(job["run"]) if job["run"] else f"  run directory {job['run_dir']}"])


def logs(job: str) -> str:
    """Returns what a job has written so far.

    Raises:
        UsageError: Nothing that can be seen from here.
    """
    path = Path(read_job(job)["log"] or "")
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UsageError(f"{job}: its output {path} cannot be read here (yet): {error.strerror}") from error


def follow(job: str, poll_s: float = _POLL_S) -> int:
    """Shows what a job writes until it has ended, over all its tries; returns its exit code.

    Ctrl-C ends the following, not the job.
    """
    said, num_seen = None, 0
    while True:
        found = read_job(job)
        if found["job_state"] != said:
            said = found["job_state"]
            print(f"{job}: {said} {found['message'] or ''}".rstrip(), flush=True)
        num_seen += _show_from(Path(found["log"] or ""), num_seen)
        if said not in _LIVE:
            return int(found["exit_code"])
        time.sleep(poll_s)


def stop(job: str, timeout_s: float) -> str:
    """Has a job checkpoint and stop, waits for it, and returns a line that says how it ended.

    Raises:
        UsageError: There is no such job, or it has ended already.
        DistFtError: It did not end in time, or otherwise than asked.
    """
    if (state := read_job(job)["job_state"]) not in _LIVE:
        raise UsageError(f"{job} is not running: it is {state}; there is nothing to stop")
    if state == "PENDING":
        _slurm("scancel", _number(job))
        return f"{job} was waiting and is cancelled"
    _slurm("scancel", "--batch", "--signal=INT", _number(job))
    deadline = time.monotonic() + timeout_s
    while (found := read_job(job))["job_state"] in _LIVE - {"COMPLETING"}:
        if time.monotonic() > deadline:
            raise DistFtError(f"{job} is still {found['job_state']} after {timeout_s:g} s")
        time.sleep(_POLL_S)
    line = f"{job}: exit code {found['exit_code']}, run directory {found['run_dir']}"
    if found["exit_code"] not in (0, 3):
        raise DistFtError(line)
    return line


def _refuse_second(run_dir: str) -> None:
    """One job a run; elsewhere the attempts in the run directory are the fence."""
    for line in _slurm("squeue", "--me", "--noheader", "--format=%i %k").splitlines():
        number, _, comment = line.strip().partition(" ")
        if comment == run_dir:
            raise UsageError(f"run {run_dir} is at work or waiting as {PREFIX}{number}; stop it first: dist-ft stop "
                             f"{PREFIX}{number}")  # fmt: skip


def _slurm(*command: str, stdin: str | None = None) -> str:
    return run_command(
        command,
        shown=command[0],
        absent="submit from a login node of the Slurm cluster",
        question="is slurmctld there?",
        limit_s=_LIMIT_S,
        stdin=stdin,
    )


def _read(template: Path) -> str:
    try:
        return template.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--template {template}: {error.strerror}; such as cluster/slurm/job.sbatch") from error


def _number(job: str) -> str:
    number = job.removeprefix(PREFIX)
    if not number.isdigit():
        raise UsageError(f"{job} is not the id of a Slurm job, such as {PREFIX}17")
    return number


def _field(shown: str, name: str, pattern: str) -> str | None:
    found = re.search(rf"(?:^|\s){name}=({pattern})", shown)
    return found[1].strip() if found else None


def _show_from(path: Path, start: int) -> int:
    try:
        with path.open("rb") as file:
            file.seek(start)
            data = file.read()
    except OSError:  # not there yet
        return 0
    sys.stdout.write(data.decode(errors="replace"))
    sys.stdout.flush()
    return len(data)
