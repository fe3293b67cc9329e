"""Heavy work as Ray tasks: the one remote function.

A Ray worker never imports torch, so the task hands its work to a plain process of its node's fork server.
"""

from __future__ import annotations

from typing import Any

import ray

from dist_ft import errors
from dist_ft.coordinator.exports import TaskSpec
from dist_ft.orchestrate.processes import run_task
from dist_ft.orchestrate.supervisor import starter_on_node


@ray.remote(num_cpus=1, max_retries=0)
def _run(name: str, arguments: dict[str, Any], starters: dict[str, str], on_gpu: bool) -> dict[str, Any]:
    node_id = ray.get_runtime_context().get_node_id()
    with starter_on_node(starters.get(node_id), on_gpu) as starter:
        try:
            return {"result": run_task(starter, name, arguments)}
        except errors.DistFtError as error:
            return {"error": error.to_dict()}


def submit_task(spec: TaskSpec, starters: dict[str, str], on_gpu: bool) -> ray.ObjectRef[dict[str, Any]]:
    """Starts a task; `task_result` waits for it."""
    return _run.remote(spec.name, spec.arguments, starters, on_gpu)


def task_result(answer: dict[str, Any]) -> dict[str, Any]:
    """Unwraps a task's answer.

    Raises:
        DistFtError: What the task raised.
    """
    if "error" in answer:
        raise errors.from_dict(answer["error"])
    return dict(answer["result"])
