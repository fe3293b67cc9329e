"""Defines the worker group: supervisors that Ray Train v2 places and watches."""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.collective
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from dist_ft.config import Config
from dist_ft.config.cluster_sections import ClusterConfig
from dist_ft.errors import CutOffError
from dist_ft.messages import CoordinatorAddress, Envelope, Reply
from dist_ft.orchestrate.workers.nodes import is_listening
from dist_ft.orchestrate.workers.scaling import AskCoordinator, ElasticPolicy, find_coordinator
from dist_ft.orchestrate.workers.supervisor import RankSlot, starter_on_node, supervise, wait_for_spec
from dist_ft.run.attempt_spec import AttemptSpec

_PREPARE_LIMIT_S = 6 * 3600.0
_CUT_OFF = 5  # exit status

TRAIN_ENV = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # the default of 2 s delays start, end and every failure
    "RAY_TRAIN_METRICS_ENABLED": "0",  # our metrics go through the coordinator
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # `ElasticPolicy` looks for notices, and drains first
}
"""Environment that the driver sets before it uses Ray Train; `start_env` adds to it."""
_START_LIMIT_S = 30.0
_START_LIMIT_PER_WORKER_S = 0.25


def start_env(max_workers: int) -> dict[str, str]:
    """Return the environment that limits the start of a group, because a node may go after it was counted."""
    limit_s = _START_LIMIT_S + _START_LIMIT_PER_WORKER_S * max_workers
    return {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": f"{limit_s:.0f}"}


class RemoteCoordinator:
    """Calls the coordinator actor from a supervisor.

    Args:
        address: Address of the coordinator.
        silence_s: `failure.limits.silence_s`.
    """

    def __init__(self, address: CoordinatorAddress, silence_s: float) -> None:
        self._ask = find_coordinator(address)
        self._head = ray.get_runtime_context().gcs_address
        self._silence_s = silence_s

    def open_attempt(self, world_size: int) -> int | None:
        """Open an attempt and return its number; return None while the attempt cannot begin yet."""
        number: int | None = ray.get(self._ask("open_attempt", world_size))
        return number

    def attempt_spec(self, number: int) -> AttemptSpec:
        """Return what all ranks of an attempt share."""
        spec: AttemptSpec = ray.get(self._ask("attempt_spec", number))
        return spec

    def starter(self, node_id: str) -> str | None:
        """Return the socket of a node's fork server, if it has one."""
        path: str | None = ray.get(self._ask("starter", node_id))
        return path

    def handle(self, envelope: Envelope) -> Reply:
        """Deliver a message and wait for the answer.

        Raises:
            CutOffError: The coordinator does not answer, and the head of the cluster is out of reach.
        """
        reference = self._ask("handle", envelope.to_dict())
        while True:
            try:
                return Reply.from_dict(ray.get(reference, timeout=self._silence_s))
            except ray.exceptions.GetTimeoutError as error:
                # A coordinator on a slow disk may still answer, so wait. Ray itself needs minutes to see a lost one.
                host, _, port = self._head.rpartition(":")
                if not is_listening(host, int(port)):
                    raise CutOffError(f"{self._head}, the head of the cluster, does not answer") from error


@dataclass(frozen=True)
class GroupSettings:
    """Holds what every worker of a group is told.

    Attributes:
        coordinator: Address of the coordinator.
        on_gpu: Whether ranks use CUDA devices.
        silence_s: `failure.limits.silence_s`.
    """

    coordinator: CoordinatorAddress
    on_gpu: bool
    silence_s: float


def train_worker(loop_config: dict[str, Any]) -> None:
    """Run one rank; Ray Train calls this in every worker, a process without torch."""
    settings: GroupSettings = loop_config["settings"]
    context = ray.train.get_context()
    coordinator = RemoteCoordinator(settings.coordinator, settings.silence_s)
    rank, world_size = context.get_world_rank(), context.get_world_size()
    number = None
    if rank == 0:
        number = wait_for_spec(lambda: coordinator.open_attempt(world_size), _PREPARE_LIMIT_S)
    number = ray.train.collective.broadcast_from_rank_zero(number)
    runtime = ray.get_runtime_context()
    gpu_ids = runtime.get_accelerator_ids().get("GPU", []) if settings.on_gpu else []
    slot = RankSlot(
        rank,
        world_size,
        context.get_local_rank(),
        context.get_local_world_size(),
        ray.util.get_node_ip_address(),
        tuple(str(i) for i in gpu_ids),
    )
    with starter_on_node(coordinator.starter(runtime.get_node_id()), settings.on_gpu) as starter:
        try:
            supervise(coordinator.attempt_spec(number), slot, coordinator, starter)
        except CutOffError:
            # Otherwise Ray keeps this process, with its device, until the node itself gives up.
            os._exit(_CUT_OFF)


class ElasticTrainer(DataParallelTrainer):
    """Ray Train's trainer without the callbacks that dist-ft never uses.

    Each callback costs an actor, a Python process that takes a second or two before the first step. Data comes from
    token shards, not from Ray Data, and on a Ray that ends with the driver no placement group can outlive it.
    `tests/contracts/test_ray_names.py` pins the names.
    """

    owns_cluster = False
    """Whether the Ray cluster ends with this driver."""
    cluster: ClusterConfig
    """The limits of the number of workers."""
    coordinator: CoordinatorAddress
    """Address of the coordinator of the run."""

    def _initialize_and_run_controller(self, **kwargs: Any) -> Any:
        policy = ElasticPolicy(self.scaling_config, self.cluster, self.coordinator)
        kwargs["scaling_policy"] = policy
        kwargs["failure_policy"] = AskCoordinator(self.run_config.failure_config, policy, self.coordinator)
        return super()._initialize_and_run_controller(**kwargs)

    def _create_default_callbacks(self) -> list[Any]:
        unused: tuple[type, ...] = (DatasetsCallback,)
        if self.owns_cluster:
            unused += (PlacementGroupCleanerCallback,)
        return [c for c in super()._create_default_callbacks() if not isinstance(c, unused)]


def make_trainer(
    config: Config, *, resources: dict[str, float], settings: GroupSettings, scratch: Path
) -> ElasticTrainer:
    """Build the trainer.

    Args:
        config: The run config.
        resources: Ray resources of one worker.
        settings: Settings of every worker.
        scratch: Storage of Ray Train, which keeps nothing of ours there. Each node makes it for itself, so its name
            must be one that no other user of a node has.
    """
    scaling = ray.train.ScalingConfig(
        num_workers=config.cluster.max_workers,
        use_gpu=resources.get("GPU", 0) > 0,
        resources_per_worker=resources,
        placement_strategy="PACK",
    )
    run = ray.train.RunConfig(
        name=f"{config.run.name}-{uuid.uuid4().hex[:8]}",
        storage_path=str(scratch),
    )
    trainer = ElasticTrainer(
        train_worker, train_loop_config={"settings": settings}, scaling_config=scaling, run_config=run
    )
    trainer.owns_cluster = config.cluster.address is None
    trainer.cluster = config.cluster
    trainer.coordinator = settings.coordinator
    return trainer
