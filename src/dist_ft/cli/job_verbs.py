"""`train`, `submit`, `status`, `logs`, `stop` and `watch`: runs elsewhere, and runs by their files."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from dist_ft.cli.check_verbs import look_around
from dist_ft.cli.inputs import compiled, load_checked
from dist_ft.cli.launcher_table import LAUNCHERS, LauncherOptions, complete_launcher, launcher_named, launcher_of
from dist_ft.cli.options import (
    AsJson,
    BatchScript,
    ConfigPath,
    Dashboard,
    Image,
    Namespace,
    Overlay,
    Overrides,
    Resume,
    RunOrJob,
    RunPath,
    SbatchOptions,
)
from dist_ft.cli.outputs import print_error, print_result
from dist_ft.errors import UsageError

if TYPE_CHECKING:
    from dist_ft.launchers.launcher import Ended

_BEGAN = time.monotonic()


def train(
    config: ConfigPath,
    overrides: Overrides = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster to run on; default starts one here.")] = None,
    resume: Resume = False,
    preflight: Annotated[bool, typer.Option(help="First look at every node, as doctor does; exit 1 if unfit.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run a config to the end: train, checkpoint, export, measure."""
    parsed = load_checked(config, [*(overrides or []), *([f"cluster.address={address}"] if address else [])])
    from dist_ft.machine import has_gpu
    from dist_ft.run.place import check_new_run

    if not resume:
        check_new_run(parsed)
    from dataclasses import asdict

    from dist_ft.orchestrate.workers.processes import ForkServer
    from dist_ft.orchestrate.workers.ray_version import check_ray_version
    from dist_ft.report.console import Console

    check_ray_version()
    if preflight:
        from dist_ft.orchestrate.health.facts import requirements_of

        look_around(requirements_of(parsed), parsed.cluster.address)
    console = Console()
    server = ForkServer(on_gpu=has_gpu())
    try:
        from dist_ft.orchestrate.driver import run

        result = run.train(parsed, server=server, began=_BEGAN, console=console)
    finally:
        console.close()
        server.close()
    if as_json:
        print(json.dumps(asdict(result)))
    else:
        print_result(result)
    raise typer.Exit(result.exit_code)


def submit(
    config: ConfigPath,
    to: Annotated[
        str,
        typer.Option("--to", help=f"One of {', '.join(LAUNCHERS)}.", autocompletion=complete_launcher),
    ],
    overrides: Overrides = None,
    address: Dashboard = None,
    follow: Annotated[bool, typer.Option("--follow", help="Show its output until it ends; exit as it does.")] = False,
    resume: Resume = False,
    preflight: Annotated[bool, typer.Option(help="There, look at every node first.")] = True,
    overlay: Overlay = None,
    namespace: Namespace = "dist-ft",
    image: Image = None,
    template: BatchScript = None,
    sbatch: SbatchOptions = None,
) -> None:
    """Start a run elsewhere."""
    from dist_ft.launchers.launcher import SubmitRequest

    options = LauncherOptions(address, overlay, namespace, image, template, tuple(sbatch or ()))
    launcher = launcher_named(to, options)
    submitted = launcher.submit(SubmitRequest(config, tuple(overrides or ()), resume, preflight))
    for line in submitted.warnings:
        typer.echo(f"warning: {line}", err=True)
    at, option = (f" to {submitted.address}", f" --address {submitted.address}") if submitted.address else ("", "")
    typer.echo(f"submitted {submitted.job}{at}; run directory {submitted.run_dir}")
    typer.echo(f"  dist-ft status|logs|stop {submitted.job}{option}")
    sys.stdout.flush()
    if follow:
        _exit_as(launcher.follow(submitted.job))


def status(run: RunOrJob, as_json: AsJson = False, address: Dashboard = None) -> None:
    """Show the state of a run from its files alone, or of a job."""
    from dist_ft.run.place import open_run
    from dist_ft.run.status import read_if_seen, read_status, render_status

    if (launcher := launcher_of(run, address)) is None:
        found = read_status(open_run(run))
        typer.echo(json.dumps(found.to_dict()) if as_json else render_status(found))
        return
    job = launcher.status(run)
    seen = read_if_seen(job.run_dir)
    if as_json:
        typer.echo(json.dumps({**asdict(job), "run": seen.to_dict() if seen else None}))
        return
    typer.echo(job.describe())
    where = f"  run directory {job.run_dir}, not visible from here (or not there yet)"
    typer.echo(where if seen is None else render_status(seen))


def logs(
    run: RunOrJob,
    address: Dashboard = None,
    follow: Annotated[bool, typer.Option("--follow", help="Of a job: until it ends; exit as it does.")] = False,
    attempt: Annotated[int | None, typer.Option(help="Of a run: an attempt; default is the newest.")] = None,
    rank: Annotated[int | None, typer.Option(help="Of a run: one rank.")] = None,
    grep: Annotated[str | None, typer.Option(help="Of a run: lines with this regular expression, once.")] = None,
    story: Annotated[bool, typer.Option("--story", help="Of a run: what happened, a line an event.")] = False,
) -> None:
    """Show the output of a job, what the ranks of a run's attempt have written, or its story."""
    if story and (attempt, rank, grep) != (None, None, None):
        raise UsageError("--story is the whole run; leave out --attempt, --rank and --grep, or --story")
    pattern = compiled(grep)
    if (launcher := launcher_of(run, address)) is not None:
        if story or (attempt, rank, grep) != (None, None, None):
            raise UsageError(f"{run} is a job; --story, --attempt, --rank and --grep are for run directories")
        if follow:
            _exit_as(launcher.follow(run))
        else:
            typer.echo(launcher.logs(run), nl=False)
        return
    if follow:
        raise UsageError(f"--follow is for jobs, and {run} is taken for a run directory; a job of Ray needs --address")
    from dist_ft.report.rank_logs import grep_logs, read_rank_logs, read_story, render_logs
    from dist_ft.run.place import open_run

    if story:
        typer.echo(read_story(open_run(run)), nl=False)
        return
    found = read_rank_logs(open_run(run), attempt, rank)
    for text in render_logs(found) if pattern is None else grep_logs(found, pattern):
        typer.echo(text)


def stop(
    run: RunOrJob,
    timeout_s: Annotated[float, typer.Option("--timeout", help="Seconds to wait for the checkpoint.")] = 600,
    address: Dashboard = None,
) -> None:
    """Ask a run or a job to checkpoint and stop, and wait until it has."""
    if (launcher := launcher_of(run, address)) is not None:
        typer.echo(launcher.stop(run, timeout_s))
        return
    from dist_ft.run.place import open_run
    from dist_ft.run.status import request_stop

    typer.echo(request_stop(open_run(run), timeout_s))


def watch(
    run: RunPath,
    every_s: Annotated[float, typer.Option("--every", help="Seconds between two looks.", min=0.1)] = 2.0,
) -> None:
    """Show a run's state anew every few seconds, until it has ended; Ctrl-C leaves it alone."""
    from dist_ft.report.watch import live_view, view
    from dist_ft.run.place import open_run

    place = open_run(run)
    if sys.stdout.isatty():
        from rich.live import Live

        shown_now, has_ended = live_view(place)
        with Live(shown_now, auto_refresh=False) as live:
            while not has_ended:
                time.sleep(every_s)
                shown_now, has_ended = live_view(place)
                live.update(shown_now, refresh=True)
        return
    shown, has_ended = None, False
    while not has_ended:
        text, has_ended = view(place)
        if text != shown:
            typer.echo(text)
        shown = text
        if not has_ended:
            time.sleep(every_s)


def _exit_as(ended: Ended | None) -> None:
    """Show how a job ended, and exit with its code; return if nobody waited for it."""
    if ended is None:
        return
    if ended.result is not None:
        print_result(ended.result)
    if ended.reason is not None:
        print_error(ended.reason)
    raise typer.Exit(ended.exit_code)
