"""The command line. Parses, calls one function a verb, prints, maps errors to exit codes.

Verbs import what they need when they are called: `dist-ft --help` and a config error must be quick.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from dist_ft import __version__
from dist_ft.errors import DistFtError, UsageError
from dist_ft.printable import printable

_BEGAN = time.monotonic()
_LINE = 2000
"""Characters of a line that quotes data, answers of models or messages of libraries."""
_CLEAR_SCREEN = "\033[H\033[2J"

app = typer.Typer(
    name="dist-ft",
    help="Fine-tune language models on a Ray cluster whose machines come and go.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="Run config (YAML).")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[a.b=value]...", help="Overrides with YAML values.")]
RunPath = Annotated[str, typer.Argument(metavar="RUN", help="Run directory: path or URL.")]
RunOrJob = Annotated[
    str,
    typer.Argument(metavar="RUN", help="Run (path or URL), job with --address, slurm:ID, kubernetes:NAMESPACE/NAME."),
]
Dashboard = Annotated[
    str | None, typer.Option("--address", help="URL of a Ray dashboard; default RAY_API_SERVER_ADDRESS, RAY_ADDRESS.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Options of dist-ft itself."""
    if version:
        typer.echo(f"dist-ft {__version__}")
        raise typer.Exit


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster to run on; default starts one here.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after the last checkpoint.")] = False,
    preflight: Annotated[bool, typer.Option(help="First look at every node, as doctor does; exit 1 if unfit.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run a config to the end: train, checkpoint, export, measure."""
    parsed = _load(config, [*(overrides or []), *([f"cluster.address={address}"] if address else [])])
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
        from dist_ft.orchestrate.health.judge import wanted_by

        _look_around(wanted_by(parsed), parsed.cluster.address)
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
        _print_result(asdict(result))
    raise typer.Exit(result.exit_code)


@app.command()
def submit(
    config: ConfigPath,
    to: Annotated[str, typer.Option("--to", help="ray, kubernetes or slurm.")],
    overrides: Overrides = None,
    address: Dashboard = None,
    follow: Annotated[bool, typer.Option("--follow", help="Show its output until it ends; exit as it does.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after the last checkpoint.")] = False,
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


@app.command()
def plan(
    config: Annotated[Path | None, typer.Argument(metavar="CONFIG", help="Run config (YAML).")] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of the config.")] = False,
) -> None:
    """Check everything that needs no cluster, and show what the run will take."""
    if schema:
        from dist_ft.config import schema_json

        typer.echo(schema_json())
        return
    if config is None:
        raise UsageError("plan needs a CONFIG, or --schema")
    parsed = _load(config, overrides or [])
    _quieten()
    prepared = _prepare_here(parsed)
    from dist_ft.jobs.plan.plan import make_plan
    from dist_ft.report.plan_text import render_plan

    result = make_plan(parsed, prepared)
    typer.echo(json.dumps(result) if as_json else render_plan(result))


@app.command()
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
    from dist_ft.run.status import read_status, render_status

    result = read_status(_open(run))
    typer.echo(json.dumps(result) if as_json else render_status(result))


@app.command()
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
        from dist_ft.run.status import read_rank_logs

        for name, text in read_rank_logs(_open(run)):
            typer.echo(f"==> {name} <==\n{text}")
    elif follow:
        from dist_ft.launchers.ray import output

        _exit_as(output.follow(server, run))
    else:
        typer.echo(server.logs(run), nl=False)


@app.command()
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
    from dist_ft.run.status import request_stop

    typer.echo(request_stop(_open(run), timeout_s))


@app.command()
def watch(
    run: RunPath,
    every_s: Annotated[float, typer.Option("--every", help="Seconds between two looks.", min=0.1)] = 2.0,
) -> None:
    """Show a run's state anew every few seconds, until it has ended; Ctrl-C leaves it alone."""
    from dist_ft.report.watch import view

    place = _open(run)
    shown, has_ended = None, False
    while not has_ended:
        text, has_ended = view(place)
        if text != shown:
            typer.echo(f"{_CLEAR_SCREEN if sys.stdout.isatty() else ''}{text}")
        shown = text
        if not has_ended:
            time.sleep(every_s)


checkpoint = typer.Typer(help="List, verify and delete a run's checkpoints.", no_args_is_help=True)
app.add_typer(checkpoint, name="checkpoint")
Steps = Annotated[list[int] | None, typer.Option("--step", help="Step of a checkpoint; may be given several times.")]


@checkpoint.command("ls")
def checkpoint_ls(run: RunPath, as_json: AsJson = False) -> None:
    """List the checkpoints of a run."""
    from dist_ft.report.checkpoints import list_checkpoints, render_checkpoints

    entries, problems = list_checkpoints(_open(run))
    found = {"checkpoints": [vars(entry) for entry in entries], "problems": problems}
    typer.echo(json.dumps(found) if as_json else render_checkpoints(entries, problems))


@checkpoint.command("verify")
def checkpoint_verify(run: RunPath, step: Steps = None) -> None:
    """Read every byte of a run's checkpoints and compare hashes and coverage; exit code 1 when one is damaged."""
    from dist_ft.report.checkpoints import verify_checkpoints

    is_whole = True
    for name, damage in verify_checkpoints(_open(run), step or []):
        is_whole = is_whole and damage is None
        typer.echo(f"{name}: {damage or 'whole'}")
    if not is_whole:
        raise typer.Exit(1)


@checkpoint.command("rm")
def checkpoint_rm(
    run: RunPath,
    step: Steps = None,
    force: Annotated[bool, typer.Option("--force", help="Even the newest one, or of a run that seems alive.")] = False,
) -> None:
    """Delete checkpoints."""
    from dist_ft.report.checkpoints import remove_checkpoints

    if not step:
        raise UsageError("checkpoint rm needs --step N; `dist-ft checkpoint ls RUN` lists them")
    for name in remove_checkpoints(_open(run), step, force):
        typer.echo(f"deleted {name}")


data = typer.Typer(help="Look at the data of a run before it costs anything.", no_args_is_help=True)
app.add_typer(data, name="data")
NoColor = Annotated[bool, typer.Option("--no-color", help="Plain marks, as where the output is no terminal.")]


@data.command("show")
def data_show(
    config: ConfigPath,
    overrides: Overrides = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Sequences to show; default is 3, or 1 with --row.")] = None,
    row: Annotated[int | None, typer.Option(min=1, help="The first of them, counted from 1.")] = None,
    source: Annotated[str, typer.Option(help="Index of a training source, as in data.train.0, or eval.")] = "0",
    as_json: AsJson = False,
    no_color: NoColor = False,
) -> None:
    """Show what the model is fed: tokens, what of them is trained, where samples begin and are cut."""
    parsed = _load(config, overrides or [])
    _quieten()
    _prepare_here(parsed)
    from dist_ft.jobs.data_report.show import show_data
    from dist_ft.report.data_text import render_show

    shown = show_data(parsed, source, row or 1, rows or (1 if row else 3))
    typer.echo(json.dumps(shown) if as_json else render_show(shown, _is_colored(no_color)))


@data.command("check")
def data_check(
    config: ConfigPath,
    overrides: Overrides = None,
    as_json: AsJson = False,
    no_color: NoColor = False,
    page: Annotated[Path | None, typer.Option("--html", help="Write the report as a page, too.")] = None,
) -> None:
    """Read every row and say what is wrong with the data; exit code 1 when a run would refuse it, or at a limit."""
    parsed = _load(config, overrides or [])
    if page is not None:
        _check_page(page)
    _quieten()
    from dist_ft.jobs.data_report.findings import check_data
    from dist_ft.report.data_page import render_check_page
    from dist_ft.report.data_text import render_check

    report = check_data(parsed)
    if page is not None:
        _write_page(page, render_check_page(report))
    typer.echo(json.dumps(report) if as_json else render_check(report, _is_colored(no_color)))
    if any(finding["severity"] == "error" for finding in report["findings"]):
        raise typer.Exit(1)


@data.command("prepare")
def data_prepare(config: ConfigPath, overrides: Overrides = None) -> None:
    """Turn the data into token shards now, so that a run need not."""
    parsed = _load(config, overrides or [])
    ahead = parsed.data.model_copy(update={"preparation": "ahead"})
    prepared = _prepare_here(parsed.model_copy(update={"data": ahead}))
    from dist_ft.report.data_text import render_prepared

    typer.echo(render_prepared(prepared))


@app.command()
def export(
    run: RunPath,
    to: Annotated[Path, typer.Option(help="Directory to write; must not exist.")],
    step: Annotated[int | None, typer.Option(help="Step of the checkpoint; default is the last.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Fold the adapter into the base model.")] = False,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; default is model.dtype.")] = None,
) -> None:
    """Write any committed checkpoint as a plain Hugging Face directory."""
    from dist_ft.run.status import find_checkpoint

    if dtype not in (None, "float32", "bfloat16"):
        raise UsageError(f"--dtype {dtype} is not float32 or bfloat16")
    if to.exists():
        raise UsageError(f"--to {to} exists; choose another directory")
    place = _open(run)
    config, checkpoint = find_checkpoint(place, step)
    from dist_ft.orchestrate.workers.processes import ForkServer, run_task

    arguments = {
        "config": config, "run_dir": place.address, "checkpoint": checkpoint, "to": str(to.absolute()),
        "merge": merge, "dtype": dtype,
    }  # fmt: skip
    server = ForkServer()
    try:
        result = run_task(server.socket_path, "export", arguments)
    finally:
        server.close()
    typer.echo(f"{result['export_dir']} (probe logits differ by {result['probe_difference']:.1e} of the largest)")


@app.command("eval")
def evaluate(
    path: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="Run (path or URL), model or adapter directory.")],
    config: ConfigPath,
    overrides: Overrides = None,
    step: Annotated[int | None, typer.Option(help="Step of a run; default is its exports.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a run, a model or an adapter on a config's held-out data."""
    parsed = _load(config, overrides or [])
    from dist_ft.jobs.target import find_target

    target = find_target(path, parsed, step)
    from dist_ft.orchestrate.driver.measure_here import measure
    from dist_ft.report.table import render_comparison, render_samples

    result = measure(path, target)
    if as_json:
        print(json.dumps(result))
        return
    print(render_comparison(result["models"]))
    if result["samples"]:
        print(f"\n{render_samples(result['samples'][:3])}")


@app.command()
def report(
    run: RunPath,
    to: Annotated[Path | None, typer.Option(help="File to write; default is report.html in the run.")] = None,
) -> None:
    """Write a page about a run from its files alone: losses, speed, attempts, checkpoints."""
    from dist_ft.report.run_page import read_run_page

    place = _open(run)
    if to is None and place.is_remote:
        raise UsageError(f"{run} is a URL; name the file to write with --to")
    path = to or place.path / "report.html"
    _check_page(path)
    _write_page(path, read_run_page(place))
    typer.echo(str(path.absolute()))


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Argument(metavar="CONFIG", help="Run config (YAML) to look for.")] = None,
    overrides: Overrides = None,
    cluster: Annotated[str | None, typer.Option(help="Ray address: look at every node of its cluster.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine, or every node of a cluster, for what runs need, or what the run of a config needs."""
    from dist_ft.orchestrate.health.judge import Wanted, wanted_by

    wanted = Wanted()
    if config is not None:
        from dist_ft.config import load_config

        wanted = wanted_by(load_config(config, overrides or []))
    _look_around(wanted, cluster, as_json)


def _look_around(wanted: Any, address: str | None, as_json: bool = False) -> None:
    """Looks at a cluster, or at this machine, and prints what was found; exits with 1 if a run cannot work with it."""
    from dist_ft.orchestrate.health.this_machine import check_installed, check_machine, nearest_existing, render_checks

    if address is None:
        checks = check_machine(nearest_existing(Path(wanted.output_dir or "")))
    else:
        from dist_ft.orchestrate.health.ask_cluster import check_cluster

        checks = check_installed() + check_cluster(address, wanted)
    print(json.dumps([vars(check) for check in checks]) if as_json else render_checks(checks), flush=True)
    if not all(check.is_ok for check in checks):
        raise typer.Exit(1)


def _load(path: Path, overrides: list[str]) -> Any:
    from dist_ft.config import check_config, load_config, with_absolute_paths, with_adapter_settings

    config = load_config(path, overrides)
    check_config(config)
    return with_absolute_paths(with_adapter_settings(config))


def _prepare_here(config: Any) -> dict[str, Any]:
    """Checks model and data and makes the token shards that are missing: a few here, many on all cores."""
    _quieten()
    from dist_ft.jobs import prepare
    from dist_ft.orchestrate.driver.prepare_here import make_shards_here
    from dist_ft.report.console import Console

    values = config.model_dump(mode="json")
    prepared = prepare.run(values, makes_all=False)
    if not (missing := prepared["missing"]):
        return prepared
    console = Console()
    try:
        make_shards_here(config, missing, console.progress)
    finally:
        console.close()
    return {**prepare.run(values), "num_made": len(missing)}


def _open(run: str) -> Any:
    from dist_ft.run.place import open_run

    return open_run(run)


def _is_colored(no_color: bool) -> bool:
    return sys.stdout.isatty() and not no_color and not os.environ.get("NO_COLOR")


def _quieten() -> None:
    """Must come before transformers is imported."""
    from dist_ft.orchestrate.workers.processes import QUIET_ENV

    os.environ.update(QUIET_ENV)


def _check_page(path: Path) -> None:
    """What can be known before the work is done."""
    if path.is_dir():
        raise UsageError(f"{path} is a directory; name a file in it")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{path}: no such directory; make {path.absolute().parent} first")


def _write_page(path: Path, text: str) -> None:
    from dist_ft.layout import write_whole

    try:
        write_whole(path.absolute(), text)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}; choose another file") from error


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
        _print_result(ended.result)
    if ended.reason is not None:
        print(f"error: {ended.reason}", file=sys.stderr)
    raise typer.Exit(ended.exit_code)


def _print_result(result: dict[str, Any]) -> None:
    if result["error"]:
        _print_error(result["error"]["message"])
    print(f"{result['state']} after {result['steps']} steps: {result['run_dir']}")
    if result["state"] == "stopped":
        print("continue with the same command and --resume")
    from dist_ft.report.table import render_comparison, render_samples

    if result["early_stop"]:
        stop = result["early_stop"]
        print(f"early stop: patience {stop['patience']} for {stop['metric']}; the best was step {stop['best_step']}")
    if result["final_loss"] is not None:
        print(f"training loss {result['final_loss']:.4f}")
    for block in (
        render_comparison(result["comparison"]),
        render_samples((result["evaluation"] or {}).get("samples", [])),
    ):
        if block:
            print(f"\n{block}")
    places = [f"{name:16}{result[key]}" for name, key in (("model", "export_dir"), ("best", "best_dir")) if result[key]]
    if places:
        print("\n" + "\n".join(places))


def _print_error(message: str) -> None:
    for line in message.split("\n"):
        print(f"error: {printable(line, _LINE)}", file=sys.stderr)


def main() -> None:
    """Entry point: prints errors as one block and exits with their code."""
    try:
        app()
    except DistFtError as error:
        _print_error(str(error))
        sys.exit(error.exit_code)
    except (ConnectionError, PermissionError) as error:  # of the store that a run is in
        _print_error(str(error))
        sys.exit(1)
    except ImportError:
        if find_spec("torch") is not None:
            raise
        # The client image (docker/client.txt).
        _print_error(
            "this installation has no torch: it is a client, for submit, status, logs, stop and watch; the rest needs "
            "the image or environment of the cluster"
        )
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
