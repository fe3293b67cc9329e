"""Arguments and options that several verbs take, and how a shell completes them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def complete_run(incomplete: str) -> list[str]:
    """Return the run directories that begin with what was typed. If there are none, the shell offers its files."""
    start = Path(incomplete or ".").expanduser()
    folder, name = (start, "") if incomplete.endswith("/") or not incomplete else (start.parent, start.name)
    found = [*folder.glob(f"{name}*/run.json"), *folder.glob(f"{name}*/*/run.json")]
    return sorted(str(path.parent) for path in found)


ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="Run config (YAML).")]
MaybeConfigPath = Annotated[Path | None, typer.Argument(metavar="CONFIG", help="Run config (YAML).")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[a.b=value]...", help="Overrides with YAML values.")]
RunPath = Annotated[str, typer.Argument(metavar="RUN", help="Run directory: path or URL.", autocompletion=complete_run)]
RunOrJob = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        help="Run (path or URL), job with --address, slurm:ID, kubernetes:NAMESPACE/NAME, local:ID.",
        autocompletion=complete_run,
    ),
]
Dashboard = Annotated[
    str | None, typer.Option("--address", help="URL of a Ray dashboard; default RAY_API_SERVER_ADDRESS, RAY_ADDRESS.")
]
Overlay = Annotated[Path | None, typer.Option(help="Kubernetes: directory such as cluster/kuberay/overlays/gpu.")]
Namespace = Annotated[str, typer.Option(help="Kubernetes: where the run goes.")]
Image = Annotated[str | None, typer.Option(help="Kubernetes: image in place of the overlay's.")]
BatchScript = Annotated[Path | None, typer.Option("--template", help="Slurm: script such as cluster/slurm/job.sbatch.")]
SbatchOptions = Annotated[
    list[str] | None, typer.Option("--sbatch", help="Slurm: option of sbatch, as --sbatch=--nodes=4.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on after the last checkpoint.")]
NoColor = Annotated[bool, typer.Option("--no-color", help="Plain marks, as where the output is no terminal.")]
Steps = Annotated[list[int] | None, typer.Option("--step", help="Step of a checkpoint; may be given several times.")]
