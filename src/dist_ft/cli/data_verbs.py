"""`data show`, `data check`, `data distill`, `data prepare`: the data of a run before it costs anything."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from dist_ft.cli.inputs import load_checked, prepare_here, quieten
from dist_ft.cli.options import AsJson, ConfigPath, NoColor, Overrides
from dist_ft.cli.outputs import check_page, is_colored, write_page
from dist_ft.errors import UsageError


def show(
    config: ConfigPath,
    overrides: Overrides = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Sequences to show; default is 3, or 1 with --row.")] = None,
    row: Annotated[int | None, typer.Option(min=1, help="The first of them, counted from 1.")] = None,
    source: Annotated[str, typer.Option(help="A training source, as in data.train.0, or eval, or eval.NAME.")] = "0",
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
    from dist_ft.report.data_text import render_check
    from dist_ft.report.pages.data_page import render_check_page

    report = check_data(parsed)
    if page is not None:
        write_page(page, render_check_page(report))
    typer.echo(json.dumps(asdict(report)) if as_json else render_check(report, is_colored(no_color)))
    if report.has_errors:
        raise typer.Exit(1)


def distill(
    config: ConfigPath,
    to: Annotated[Path, typer.Option("--to", help="JSONL file of rows to train on; it must not exist.")],
    overrides: Overrides = None,
    teacher: Annotated[
        str | None, typer.Option(help="A model, an export, or a URL that ends with /v1; default objective.teacher.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Name of the model at a URL.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer; longer ones are left out.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token each time.")] = 0.0,
    parallel: Annotated[int, typer.Option(min=1, help="Requests at a time to a URL.")] = 8,
    as_json: AsJson = False,
) -> None:
    """Let a teacher answer the prompts of the training data; a work that was stopped goes on when run again."""
    is_url = teacher is not None and "://" in teacher
    if is_url != (model is not None):
        raise UsageError("--teacher https://…/v1 and --model go together: the address of an API, and a model there")
    named = [] if teacher is None or is_url else [f"objective={json.dumps({'kind': 'distill', 'teacher': teacher})}"]
    parsed = load_checked(config, [*(overrides or []), *named])
    quieten()
    from dist_ft.config.training_sections import DistillConfig
    from dist_ft.evaluate.teachers import LocalTeacher, RemoteTeacher, Sampling, Teacher
    from dist_ft.jobs.answer import Answered, answer_prompts
    from dist_ft.report.console import Console

    sampling = Sampling(max_new_tokens, temperature, parsed.run.seed)
    by: Teacher
    if teacher is not None and model is not None:
        by = RemoteTeacher(teacher, model, sampling, parallel)
    elif isinstance(parsed.objective, DistillConfig):
        by = LocalTeacher(parsed, parsed.objective, sampling)
    else:
        raise UsageError("name who answers: --teacher, or objective.kind=distill with objective.teacher")
    console = Console()

    def show(done: Answered) -> None:
        console.progress(f"  {done.prompts:,} prompts answered by {by.name}")

    try:
        done = answer_prompts(parsed, by, sampling, to, show)
    finally:
        console.close()
    typer.echo(json.dumps(asdict(done)) if as_json else done.describe(by.name, to))
    if not done.rows:
        raise typer.Exit(1)


def prepare(config: ConfigPath, overrides: Overrides = None) -> None:
    """Turn the data into token shards now, so that a run need not."""
    parsed = load_checked(config, overrides)
    ahead = parsed.data.model_copy(update={"preparation": "ahead"})
    prepared = prepare_here(parsed.model_copy(update={"data": ahead}))
    from dist_ft.report.data_text import render_prepared

    typer.echo(render_prepared(prepared))
