"""What is to be computed from a finished run, as task descriptions; running them is `orchestrate/driver/tasks.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

from dist_ft.checkpoint.manifest import Manifest
from dist_ft.config import Config
from dist_ft.run.place import RunPlace


@dataclass(frozen=True)
class TaskSpec:
    """A call of `dist_ft.tasks.<name>.run(**arguments)` in a process of its own.

    Attributes:
        name: Module in `dist_ft.tasks`.
        arguments: JSON values.
        needs_device: Wants a GPU, where the run has any.
    """

    name: str
    arguments: dict[str, Any]
    needs_device: bool = False


def export_task(config: Config, run_dir: RunPlace, manifest: Manifest) -> TaskSpec:
    """Consolidates a checkpoint into `exports/step-…` and verifies it."""
    arguments = {
        "config": config.model_dump(mode="json"),
        "run_dir": run_dir.address,
        "checkpoint": f"{manifest.directory}/manifest.json",
        "to": run_dir.address_of(run_dir.export_name(manifest.step)),
    }
    return TaskSpec("export", arguments)


def evaluate_tasks(
    config: Config, models: Mapping[str, str | None], num_workers: int, num_nodes: int
) -> list[TaskSpec]:
    """Has the workers measure generated answers, when the config asks for it; each takes its share of the batches.

    Args:
        config: The run config.
        models: As in `tasks.evaluate`.
        num_workers: How many tasks.
        num_nodes: Machines that they are spread over.
    """
    if not config.eval.metrics:
        return []
    shared = {
        "config": config.model_dump(mode="json"),
        "models": dict(models),
        "num_shards": num_workers,
        "num_local": ceil(num_workers / num_nodes),
    }
    return [TaskSpec("evaluate", {**shared, "shard": shard}, needs_device=True) for shard in range(num_workers)]
