"""`train`: run a config here to its end."""

from __future__ import annotations

import json
import time
from typing import Annotated

import typer

from dist_ft.cli.check_verbs import look_around
from dist_ft.cli.inputs import load_checked
from dist_ft.cli.options import AsJson, ConfigPath, Overrides, Resume
from dist_ft.cli.outputs import print_result

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
