"""`plan`, `doctor` and `import`: check a config, a machine or a cluster before a run begins; bring a config along."""

from __future__ import annotations

import json
from enum import StrEnum
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
    """Check a cluster or this machine and print the findings. Exits with 1 if a run cannot work there."""
    from dist_ft.orchestrate.health.this_machine import check_installed, check_machine, nearest_existing, render_checks

    if address is None:
        checks = check_machine(nearest_existing(Path(wanted.output_dir or "")))
    else:
        from dist_ft.orchestrate.health.ask_cluster import check_cluster

        checks = check_installed() + check_cluster(address, wanted)
    print(json.dumps([vars(check) for check in checks]) if as_json else render_checks(checks), flush=True)
    if not all(check.is_ok for check in checks):
        raise typer.Exit(1)


class Tool(StrEnum):
    """The tools whose configs can be imported."""

    axolotl = "axolotl"
    llamafactory = "llamafactory"
    trl = "trl"


class Method(StrEnum):
    """The commands of TRL."""

    sft = "sft"
    dpo = "dpo"
    kto = "kto"


def import_config(
    tool: Annotated[Tool, typer.Argument(metavar="TOOL", help="axolotl, llamafactory or trl.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Its config (YAML).")],
    to: Annotated[Path | None, typer.Option("--to", help="Where to write the config; without, it is printed.")] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="How many GPUs the config was for.")] = None,
    unquantised: Annotated[bool, typer.Option("--unquantised", help="Leave a quantised base as it is.")] = False,
    templates: Annotated[Path | None, typer.Option(help="Folder of chat templates, NAME.jinja.")] = None,
    dataset_dir: Annotated[Path | None, typer.Option(help="Folder of dataset_info.json (LLaMA-Factory).")] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Take over this permission.")] = False,
    method: Annotated[Method, typer.Option(help="Command of TRL that the file is for.")] = Method.sft,
    partial: Annotated[bool, typer.Option("--partial", help="Write what can be said, without refused keys.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a dist-ft config that trains the same as a config of another tool, and say what becomes of every key."""
    from dist_ft.importers.run_import import import_file
    from dist_ft.importers.verdicts import Options
    from dist_ft.importers.written import config_text, refusal_text, report_json, report_text

    if method is not Method.sft and tool is not Tool.trl:
        raise UsageError(f"--method {method.value} is for trl; a file of {tool.value} says itself what it trains")
    if templates is not None and not templates.is_dir():
        raise UsageError(f"--templates {templates}: no such folder; name one that holds NAME.jinja")
    if dataset_dir is not None and not (dataset_dir / "dataset_info.json").is_file():
        raise UsageError(f"--dataset-dir {dataset_dir}: there is no dataset_info.json; name the folder that holds it")
    if to is not None and (to.is_dir() or not to.absolute().parent.is_dir()):
        raise UsageError(f"--to {to} is no file that can be written; name one in a folder that is there")
    options = Options(gpus, unquantised, templates, dataset_dir, trust_remote_code, method.value)
    result = import_file(tool.value, file, options)
    is_written = partial or not result.refused
    typer.echo(report_json(result) if as_json else report_text(result))
    if is_written and to is not None:
        from dist_ft.cli.outputs import write_page

        write_page(to, config_text(result))
    elif is_written and not as_json:
        typer.echo(f"\n{config_text(result)}", nl=False)
    if result.refused and not partial:
        raise UsageError(f"{refusal_text(result)}\nnothing was written; --partial writes the rest")
