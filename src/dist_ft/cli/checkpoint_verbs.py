"""`checkpoint ls|verify|tag|rm|import` and `export`."""

from __future__ import annotations

import json
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from dist_ft.cli.inputs import load_checked, prepare_here
from dist_ft.cli.options import AsJson, ConfigPath, Overrides, RunPath, Steps
from dist_ft.errors import UsageError

_DTYPES: dict[str, tuple[str, ...]] = {
    "hf": ("float32", "bfloat16"),
    "gguf": ("f32", "f16", "bf16", "q8_0"),
    "universal": (),
}
"""Formats of an export, each with the dtypes that it may have."""


def list_checkpoints(run: RunPath, as_json: AsJson = False) -> None:
    """List the checkpoints of a run."""
    from dist_ft.report import checkpoints
    from dist_ft.run.place import open_run

    entries, problems = checkpoints.list_checkpoints(open_run(run))
    found = {"checkpoints": [vars(entry) for entry in entries], "problems": problems}
    typer.echo(json.dumps(found) if as_json else checkpoints.render_checkpoints(entries, problems))


def verify(run: RunPath, step: Steps = None) -> None:
    """Read every byte of a run's checkpoints and compare hashes and coverage; exit code 1 when one is damaged."""
    from dist_ft.report.checkpoints import verify_checkpoints
    from dist_ft.run.place import open_run

    is_whole = True
    for name, damage in verify_checkpoints(open_run(run), step or []):
        is_whole = is_whole and damage is None
        typer.echo(f"{name}: {damage or 'whole'}")
    if not is_whole:
        raise typer.Exit(1)


def tag(
    run: RunPath,
    name: Annotated[str, typer.Argument(metavar="TAG", help="Name such as `before-the-merge`.")],
    step: Annotated[int | None, typer.Option(help="Step of the checkpoint; default is the last.")] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Take the name away; the rules of the run apply.")] = False,
) -> None:
    """Give a checkpoint a name, so that the run never deletes it."""
    from dist_ft.checkpoint.holds import remove_tag
    from dist_ft.report.checkpoints import tag_checkpoint
    from dist_ft.run.place import open_run
    from dist_ft.run.status import read_record

    place = open_run(run)
    if remove:
        read_record(place)
        remove_tag(place.store, name)
        typer.echo(f"removed the tag {name}")
        return
    typer.echo(f"{tag_checkpoint(place, name, step)} is tagged {name}")


def remove(
    run: RunPath,
    step: Steps = None,
    force: Annotated[bool, typer.Option("--force", help="Even the newest one, or of a run that seems alive.")] = False,
) -> None:
    """Delete checkpoints."""
    from dist_ft.report.checkpoints import remove_checkpoints
    from dist_ft.run.place import open_run

    if not step:
        raise UsageError("checkpoint rm needs --step N; `dist-ft checkpoint ls RUN` lists them")
    for name in remove_checkpoints(open_run(run), step, force):
        typer.echo(f"deleted {name}")


def import_checkpoint(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="Of DeepSpeed, or of the Trainer (checkpoint-500).")],
    config: ConfigPath,
    overrides: Overrides = None,
) -> None:
    """Make a new run from another tool's checkpoint: weights, moments, step. `train --resume` goes on from it."""
    from dist_ft.run.place import check_new_run

    if not source.is_dir():
        raise UsageError(f"{source} is no directory; name the checkpoint's")
    parsed = load_checked(config, overrides or [])
    check_new_run(parsed)
    inputs = prepare_here(parsed).inputs
    arguments = {"config": parsed.model_dump(mode="json"), "inputs": inputs.to_dict(), "source": str(source.absolute())}
    found = _run_task("import_checkpoint", arguments)
    typer.echo(f"{found['run_dir']}: step {found['step']}")
    for note in found["notes"]:
        typer.echo(f"  {note}")
    typer.echo(f"  dist-ft train {shlex.join([str(config), *(overrides or [])])} --resume")


def export(
    run: RunPath,
    to: Annotated[Path, typer.Option(help="Directory to write; must not exist.")],
    step: Annotated[int | None, typer.Option(help="Step of the checkpoint; default is the last.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Fold the adapter into the base model.")] = False,
    file_format: Annotated[
        str,
        typer.Option(
            "--format",
            help="hf: a Hugging Face directory; gguf: for llama.cpp and Ollama; universal: for stock DeepSpeed.",
        ),
    ] = "hf",
    dtype: Annotated[
        str | None,
        typer.Option(help="float32 or bfloat16; for gguf f32, f16, bf16 or q8_0. Default is model.dtype."),
    ] = None,
    base_name: Annotated[
        str | None, typer.Option(help="Name of an adapter's base model where it will be used; default is model.name.")
    ] = None,
) -> None:
    """Write any committed checkpoint as a Hugging Face directory, in GGUF, or as DeepSpeed's universal checkpoint."""
    from dist_ft.run.place import open_run
    from dist_ft.run.status import find_checkpoint

    _check_format(file_format, merge, dtype, base_name)
    if to.exists():
        raise UsageError(f"--to {to} exists; choose another directory")
    place = open_run(run)
    config, checkpoint = find_checkpoint(place, step)
    if base_name is not None and (merge or config.method.kind != "lora"):
        raise UsageError(
            f"--base-name {base_name} names the base model of an adapter, and the export is a whole model; leave it out"
        )
    arguments = {
        "config": config.model_dump(mode="json"), "run_dir": place.address, "checkpoint": checkpoint,
        "to": str(to.absolute()),
    }  # fmt: skip
    if file_format == "universal":
        found = _run_task("export_universal", arguments)
        typer.echo(
            f"{to.absolute()} (step {found['step']}): with checkpoint.load_universal in its config and "
            f"{found['num_groups']} group(s) in its optimizer, engine.load_checkpoint of DeepSpeed goes on from it"
        )
        return
    from dist_ft.jobs.spec import ExportResult

    written = {**arguments, "merge": merge, "dtype": dtype, "base_name": base_name}
    result = ExportResult(**_run_task("export_gguf" if file_format == "gguf" else "export", written))
    typer.echo(f"{result.export_dir} (probe logits differ by {result.probe_difference:.1e} of the largest)")


def _check_format(file_format: str, merge: bool, dtype: str | None, base_name: str | None) -> None:
    if file_format not in _DTYPES:
        raise UsageError(f"--format {file_format} is not hf, gguf or universal")
    dtypes = _DTYPES[file_format]
    if not dtypes and (merge or dtype or base_name):
        raise UsageError(
            f"--format {file_format} holds float32 masters and moments as they are; leave out --merge, --dtype and "
            "--base-name"
        )
    if dtype not in (None, *dtypes):
        raise UsageError(f"--dtype {dtype} is not {', '.join(dtypes[:-1])} or {dtypes[-1]} (--format {file_format})")
    if file_format == "gguf" and find_spec("gguf") is None:
        raise UsageError("--format gguf needs the package gguf; run `pip install 'dist-ft[gguf]'`")


def _run_task(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Run a task in a process of its own, which imports torch."""
    from dist_ft.orchestrate.workers.processes import ForkServer, run_task

    server = ForkServer()
    try:
        return run_task(server.socket_path, name, arguments)
    finally:
        server.close()
