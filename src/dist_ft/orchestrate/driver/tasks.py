"""Runs heavy work as Ray tasks. Owns the only remote function.

A Ray worker never imports torch, so the task hands its work to a plain process of its node's fork server.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray

from dist_ft import errors
from dist_ft.errors import DistFtError, WorkerCrashError
from dist_ft.jobs.spec import TaskSpec
from dist_ft.orchestrate.workers.nodes import on_node
from dist_ft.orchestrate.workers.processes import run_task
from dist_ft.orchestrate.workers.supervisor import starter_on_node

logger = logging.getLogger(__name__)

_POLL_S = 0.25


@ray.remote(num_cpus=1, max_retries=0)
def _run(
    name: str, arguments: dict[str, Any], starters: dict[str, str], on_gpu: bool, device: int | None = None
) -> dict[str, Any]:
    node_id = ray.get_runtime_context().get_node_id()
    devices = ray.get_runtime_context().get_accelerator_ids()["GPU"] if device is None else [str(device)]
    env = {"CUDA_VISIBLE_DEVICES": ",".join(devices)} if devices else {}
    with starter_on_node(starters.get(node_id), on_gpu) as starter:
        try:
            return {"result": run_task(starter, name, arguments, env=env)}
        except errors.DistFtError as error:
            return {"error": error.to_dict()}


def run_tasks(
    specs: Sequence[TaskSpec], starters: Mapping[str, str], on_gpu: bool, check: Callable[[], None]
) -> list[dict[str, Any]]:
    """Run tasks in parallel and return their results in order; run a task that dies once more.

    Args:
        specs: The tasks.
        starters: Sockets of the fork servers, by node id.
        on_gpu: Whether the run uses CUDA devices.
        check: Called now and then; an exception that it raises ends the wait.

    Raises:
        DistFtError: The error of a task.
    """
    tries = dict.fromkeys(range(len(specs)), 1)

    def submit(spec: TaskSpec) -> ray.ObjectRef[dict[str, Any]]:
        num_gpus = 1 if spec.needs_device and on_gpu else 0
        return _run.options(num_gpus=num_gpus).remote(spec.name, spec.arguments, dict(starters), on_gpu)

    waiting = {submit(spec): index for index, spec in enumerate(specs)}
    results: dict[int, dict[str, Any]] = {}
    while waiting:
        check()
        for reference in ray.wait([*waiting], timeout=_POLL_S)[0]:
            index = waiting.pop(reference)
            try:
                results[index] = result_of(reference)
            except DistFtError as error:
                if not error.retryable or tries[index] > 1:
                    raise
                logger.warning("task %s is run once more: %s", specs[index].name, error)
                tries[index] += 1
                waiting[submit(specs[index])] = index
    return [results[index] for index in range(len(specs))]


def submit_to(
    node_id: str, spec: TaskSpec, starters: Mapping[str, str], on_gpu: bool, device: int | None = None
) -> ray.ObjectRef[dict[str, Any]]:
    """Run a task on a node without asking Ray for a CPU; the caller limits how many run there.

    Args:
        node_id: The node.
        spec: The task.
        starters: Sockets of the fork servers, by node id.
        on_gpu: Whether the run uses CUDA devices.
        device: Index of the node's GPU that the task uses; None for none.
    """
    remote = _run.options(num_cpus=0, scheduling_strategy=on_node(node_id))
    return remote.remote(spec.name, spec.arguments, {node_id: starters[node_id]}, on_gpu, device)


def result_of(reference: ray.ObjectRef[dict[str, Any]]) -> dict[str, Any]:
    """Return the result of a finished task.

    Raises:
        DistFtError: The error of the task, or a WorkerCrashError if the task was lost.
    """
    try:
        answer = ray.get(reference)
    except ray.exceptions.RayError as error:
        raise WorkerCrashError(f"a task was lost with its worker: {str(error).splitlines()[0]}") from error
    if "error" in answer:
        raise errors.from_dict(answer["error"])
    return dict(answer["result"])
