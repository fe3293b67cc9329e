"""`eval`, `report` and `compare`: measure a model, describe runs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from dist_ft.cli.inputs import load_checked
from dist_ft.cli.options import AsJson, ConfigPath, Overrides, RunPath
from dist_ft.cli.outputs import check_page, write_page
from dist_ft.errors import UsageError


def evaluate(
    path: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="Run (path or URL), model or adapter directory.")],
    config: ConfigPath,
    overrides: Overrides = None,
    step: Annotated[int | None, typer.Option(help="Step of a run; default is its exports.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a run, a model or an adapter on a config's held-out data."""
    parsed = load_checked(config, overrides)
    from dist_ft.evaluate.target import find_target

    target = find_target(path, parsed, step)
    from dist_ft.orchestrate.without_cluster import measure
    from dist_ft.report.table import render_comparison, render_samples

    result = measure(path, target)
    if as_json:
        print(json.dumps(asdict(result)))
        return
    print(render_comparison(result.models))
    if result.samples:
        print(f"\n{render_samples(result.samples[:3])}")


def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN RUN...", help="Run directories: paths or URLs.")],
    to: Annotated[Path | None, typer.Option(help="HTML page to write besides.")] = None,
) -> None:
    """Compare runs: what their configs differ in, their curves and their results."""
    if len(runs) < 2:
        raise UsageError(f"compare needs at least two runs, and got {len(runs)}")
    from dist_ft.report.pages.compare import name_runs, render_page, render_text
    from dist_ft.report.pages.run_files import read_run_files
    from dist_ft.run.place import open_run

    if to is not None:
        check_page(to)
    files = [read_run_files(open_run(run)) for run in runs]
    names = name_runs(runs, files)
    typer.echo(render_text(names, files))
    if to is not None:
        write_page(to, render_page(names, files))
        typer.echo(f"\n{to.absolute()}")


def report(
    run: RunPath,
    to: Annotated[Path | None, typer.Option(help="File to write; default is report.html in the run.")] = None,
) -> None:
    """Write a page about a run from its files alone: curves, results, answers, attempts, data, config."""
    from dist_ft.report.pages.run_files import read_run_files
    from dist_ft.report.pages.run_page import render_run_page
    from dist_ft.run.place import open_run

    place = open_run(run)
    if to is None and place.is_remote:
        raise UsageError(f"{run} is a URL; name the file to write with --to")
    path = to or place.path / "report.html"
    check_page(path)
    write_page(path, render_run_page(read_run_files(place)))
    typer.echo(str(path.absolute()))
