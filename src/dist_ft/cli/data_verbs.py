"""`data show`, `data check`, `data prepare`: the data of a run before it costs anything."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from dist_ft.cli.inputs import load_checked, prepare_here, quieten
from dist_ft.cli.options import AsJson, ConfigPath, NoColor, Overrides
from dist_ft.cli.outputs import check_page, is_colored, write_page


def show(
    config: ConfigPath,
    overrides: Overrides = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Sequences to show; default is 3, or 1 with --row.")] = None,
    row: Annotated[int | None, typer.Option(min=1, help="The first of them, counted from 1.")] = None,
    source: Annotated[str, typer.Option(help="Index of a training source, as in data.train.0, or eval.")] = "0",
    as_json: AsJson = False,
    no_color: NoColor = False,
) -> None:
    """Show what the model is fed: tokens, what of them is trained, where samples begin and are cut."""
    parsed = load_checked(config, overrides)
    quieten()
    prepare_here(parsed)
    from dist_ft.jobs.data_report.show import show_data
    from dist_ft.report.data_text import render_show

    shown = show_data(parsed, source, row or 1, rows or (1 if row else 3))
    typer.echo(json.dumps(asdict(shown)) if as_json else render_show(shown, is_colored(no_color)))


def check(
    config: ConfigPath,
    overrides: Overrides = None,
    as_json: AsJson = False,
    no_color: NoColor = False,
    page: Annotated[Path | None, typer.Option("--html", help="Write the report as a page, too.")] = None,
) -> None:
    """Read every row and say what is wrong with the data; exit code 1 when a run would refuse it, or at a limit."""
    parsed = load_checked(config, overrides)
    if page is not None:
        check_page(page)
    quieten()
    from dist_ft.jobs.data_report.findings import check_data
    from dist_ft.report.data_page import render_check_page
    from dist_ft.report.data_text import render_check

    report = check_data(parsed)
    if page is not None:
        write_page(page, render_check_page(report))
    typer.echo(json.dumps(asdict(report)) if as_json else render_check(report, is_colored(no_color)))
    if report.has_errors:
        raise typer.Exit(1)


def prepare(config: ConfigPath, overrides: Overrides = None) -> None:
    """Turn the data into token shards now, so that a run need not."""
    parsed = load_checked(config, overrides)
    ahead = parsed.data.model_copy(update={"preparation": "ahead"})
    prepared = prepare_here(parsed.model_copy(update={"data": ahead}))
    from dist_ft.report.data_text import render_prepared

    typer.echo(render_prepared(prepared))
