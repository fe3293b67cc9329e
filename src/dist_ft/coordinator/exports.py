"""What is to be computed from a finished run, as task descriptions; running them is `orchestrate/tasks.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dist_ft.checkpoint.manifest import Manifest
from dist_ft.config import Config
from dist_ft.rundir import RunDir


@dataclass(frozen=True)
class TaskSpec:
    """A call of `dist_ft.tasks.<name>.run(**arguments)` in a process of its own.

    Attributes:
        name: Module in `dist_ft.tasks`.
        arguments: JSON values.
    """

    name: str
    arguments: dict[str, Any]


def export_task(config: Config, run_dir: RunDir, manifest: Manifest) -> TaskSpec:
    """Consolidates a checkpoint into `exports/step-…` and verifies it."""
    arguments = {
        "config": config.model_dump(mode="json"),
        "run_dir": str(run_dir.path),
        "checkpoint": f"{manifest.directory}/manifest.json",
        "to": str(run_dir.export(manifest.step)),
    }
    return TaskSpec("export", arguments)


def evaluate_task(config: Config, run_dir: RunDir, step: int) -> TaskSpec | None:
    """Measures generated answers of the base model and the export, when the config asks for it."""
    if not config.eval.metrics:
        return None
    arguments = {"config": config.model_dump(mode="json"), "export_dir": str(run_dir.export(step))}
    return TaskSpec("evaluate", arguments)
