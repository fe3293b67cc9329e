"""`submit`, `status`, `logs`, `stop` and `watch`: runs elsewhere, and runs by their files."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from dist_ft.cli.options import AsJson, ConfigPath, Dashboard, Overrides, Resume, RunOrJob, RunPath
from dist_ft.cli.outputs import print_result
from dist_ft.errors import UsageError

_CLEAR_SCREEN = "\033[H\033[2J"


def submit(
    config: ConfigPath,
    to: Annotated[str, typer.Option("--to", help="ray, kubernetes or slurm.")],
    overrides: Overrides = None,
    address: Dashboard = None,
    follow: Annotated[bool, typer.Option("--follow", help="Show its output until it ends; exit as it does.")] = False,
    resume: Resume = False,
    preflight: Annotated[bool, typer.Option(help="There, look at every node first.")] = True,
    overlay: Annotated[
        Path | None, typer.Option(help="Kubernetes: directory such as cluster/kuberay/overlays/gpu.")
    ] = None,
    namespace: Annotated[str, typer.Option(help="Kubernetes: where the run goes.")] = "dist-ft",
    image: Annotated[str | None, typer.Option(help="Kubernetes: image in place of the overlay's.")] = None,
    template: Annotated[Path | None, typer.Option(help="Slurm: script such as cluster/slurm/job.sbatch.")] = None,
    sbatch: Annotated[list[str] | None, typer.Option(help="Slurm: option of sbatch, as --sbatch=--nodes=4.")] = None,
) -> None:
    """Start a run elsewhere."""
    from dist_ft.launchers.launcher import SubmitRequest

    request = SubmitRequest(config, tuple(overrides or ()), resume, follow, preflight)
    if to == "ray":
        from dist_ft.launchers.ray import jobs

        _exit_as(jobs.submit(request, address))
    elif to == "kubernetes":
        if overlay is None:
            raise UsageError("--to kubernetes needs --overlay DIR, such as cluster/kuberay/overlays/gpu")
        from dist_ft.launchers.kubernetes import submit

        raise typer.Exit(submit.submit(request, overlay, namespace=namespace, image=image))
    elif to == "slurm":
        if template is None:
            raise UsageError("--to slurm needs --template FILE, such as cluster/slurm/job.sbatch")
        from dist_ft.launchers import slurm

        raise typer.Exit(slurm.submit(request, template, sbatch or []))
    else:
        raise UsageError(f"--to {to} is none of ray, kubernetes, slurm")


def status(run: RunOrJob, as_json: AsJson = False, address: Dashboard = None) -> None:
    """Show the state of a run from its files alone, or of a job."""
    if (launcher := _launcher_of(run)) is not None:
        found = launcher.read_job(str(run))
        typer.echo(json.dumps(found) if as_json else launcher.render_job(found))
        return
    if (server := _job_server(run, address)) is not None:
        from dist_ft.launchers.ray.jobs import read_job, render_job

        job = read_job(server, run)
        typer.echo(json.dumps(job) if as_json else render_job(job))
        return
    from dist_ft.run.place import open_run
    from dist_ft.run.status import read_status, render_status

    result = read_status(open_run(run))
    typer.echo(json.dumps(result) if as_json else render_status(result))


def logs(
    run: RunOrJob,
    address: Dashboard = None,
    follow: Annotated[bool, typer.Option("--follow", help="Of a job: until it ends; exit as it does.")] = False,
) -> None:
    """Show the output of a job, or what the ranks of a run's newest attempt have written."""
    if (launcher := _launcher_of(run)) is not None:
        if follow:
            raise typer.Exit(launcher.follow(str(run)))
        typer.echo(launcher.logs(str(run)), nl=False)
        return
    server = _job_server(run, address)
    if server is None and follow:
        raise UsageError(f"--follow is for jobs, and {run} is taken for a run directory; a job needs --address")
    if server is None:
        from dist_ft.run.place import open_run
        from dist_ft.run.status import read_rank_logs

        for name, text in read_rank_logs(open_run(run)):
            typer.echo(f"==> {name} <==\n{text}")
    elif follow:
        from dist_ft.launchers.ray import output

        _exit_as(output.follow(server, run))
    else:
        typer.echo(server.logs(run), nl=False)


def stop(
    run: RunOrJob,
    timeout_s: Annotated[float, typer.Option("--timeout", help="Seconds to wait for the checkpoint.")] = 600,
    address: Dashboard = None,
) -> None:
    """Ask a run or a job to checkpoint and stop, and wait until it has."""
    if (launcher := _launcher_of(run)) is not None:
        typer.echo(launcher.stop(str(run), timeout_s))
        return
    if (server := _job_server(run, address)) is not None:
        from dist_ft.launchers.ray import jobs

        typer.echo(jobs.stop(server, run, timeout_s))
        return
    from dist_ft.run.place import open_run
    from dist_ft.run.status import request_stop

    typer.echo(request_stop(open_run(run), timeout_s))


def watch(
    run: RunPath,
    every_s: Annotated[float, typer.Option("--every", help="Seconds between two looks.", min=0.1)] = 2.0,
) -> None:
    """Show a run's state anew every few seconds, until it has ended; Ctrl-C leaves it alone."""
    from dist_ft.report.watch import view
    from dist_ft.run.place import open_run

    place = open_run(run)
    shown, has_ended = None, False
    while not has_ended:
        text, has_ended = view(place)
        if text != shown:
            typer.echo(f"{_CLEAR_SCREEN if sys.stdout.isatty() else ''}{text}")
        shown = text
        if not has_ended:
            time.sleep(every_s)


def _launcher_of(run: str) -> Any:
    """Returns the module that looks after jobs of RUN's kind, if RUN names one by its prefix."""
    if run.startswith("slurm:"):
        from dist_ft.launchers import slurm

        return slurm
    if run.startswith("kubernetes:"):
        from dist_ft.launchers.kubernetes import job

        return job
    return None


def _job_server(run: str, address: str | None) -> Any:
    """Returns the server of the cluster that is named, if RUN can only be a job of it."""
    is_one_word = len(Path(run).parts) == 1 and not Path(run).exists()
    if not is_one_word or not (address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")):
        return None
    from dist_ft.launchers.ray.server import JobServer

    return JobServer(address)


def _exit_as(ended: Any) -> None:
    """Shows how a job ended, and exits with its code; returns if nobody waited for it."""
    if ended is None:
        return
    if ended.result is not None:
        print_result(ended.result)
    if ended.reason is not None:
        print(f"error: {ended.reason}", file=sys.stderr)
    raise typer.Exit(ended.exit_code)
