"""`plan` and `doctor`: check a config, a machine or a cluster before a run begins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dist_ft.cli.inputs import load_checked, prepare_here, quieten
from dist_ft.cli.options import AsJson, MaybeConfigPath, Overrides
from dist_ft.errors import UsageError

if TYPE_CHECKING:
    from dist_ft.orchestrate.health.facts import Requirements


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
    typer.echo(json.dumps(result.to_dict()) if as_json else render_plan(result))


def doctor(
    config: MaybeConfigPath = None,
    overrides: Overrides = None,
    cluster: Annotated[str | None, typer.Option(help="Ray address: look at every node of its cluster.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine, or every node of a cluster, for what runs need, or what the run of a config needs."""
    from dist_ft.orchestrate.health.facts import Requirements, requirements_of

    wanted = Requirements()
    if config is not None:
        from dist_ft.config import load_config

        wanted = requirements_of(load_config(config, overrides or []))
    look_around(wanted, cluster, as_json)


def look_around(wanted: Requirements, address: str | None, as_json: bool = False) -> None:
    """Checks a cluster or this machine and prints the findings. Exits with 1 if a run cannot work there."""
    from dist_ft.orchestrate.health.this_machine import check_installed, check_machine, nearest_existing, render_checks

    if address is None:
        checks = check_machine(nearest_existing(Path(wanted.output_dir or "")))
    else:
        from dist_ft.orchestrate.health.ask_cluster import check_cluster

        checks = check_installed() + check_cluster(address, wanted)
    print(json.dumps([vars(check) for check in checks]) if as_json else render_checks(checks), flush=True)
    if not all(check.is_ok for check in checks):
        raise typer.Exit(1)
