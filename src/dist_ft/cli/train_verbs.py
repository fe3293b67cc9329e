"""`train` and `plan`: run a config here, or say what it will take."""

from __future__ import annotations

import json
import time
from typing import Annotated

import typer

from dist_ft.cli.doctor_verb import look_around
from dist_ft.cli.inputs import load_checked, prepare_here, quieten
from dist_ft.cli.options import AsJson, ConfigPath, MaybeConfigPath, Overrides, Resume
from dist_ft.cli.outputs import print_result
from dist_ft.errors import UsageError

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


def plan(
    config: MaybeConfigPath = None,
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
    parsed = load_checked(config, overrides)
    quieten()
    prepared = prepare_here(parsed)
    from dist_ft.jobs.plan.plan import make_plan
    from dist_ft.report.plan_text import render_plan

    result = make_plan(parsed, prepared.inputs)
    typer.echo(json.dumps(result) if as_json else render_plan(result))
