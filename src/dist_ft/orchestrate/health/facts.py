"""Defines the types that the modules of this folder exchange: requirements of a run, facts of a node, and checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dist_ft.config import Config, with_absolute_paths


@dataclass(frozen=True)
class Check:
    """The outcome of one check.

    Attributes:
        name: Subject of the check.
        is_ok: Whether runs can work with it.
        detail: What was found.
        hint: What to do about it, if anything.
    """

    name: str
    is_ok: bool
    detail: str
    hint: str = ""


@dataclass(frozen=True)
class Requirements:
    """Holds what a run requires of the cluster.

    Attributes:
        output_dir: Absolute `run.output_dir`; None means that no run is given and storage is not checked.
        wandb: `monitor.wandb`.
        num_workers: The fewest workers that the run starts with.
        resources: Resources of a worker; None means the default of `machine.worker_resources`.
    """

    output_dir: str | None = None
    wandb: str = "auto"
    num_workers: int = 1
    resources: Mapping[str, float] | None = None


def requirements_of(config: Config) -> Requirements:
    """Return what a config requires of a cluster."""
    return Requirements(
        output_dir=with_absolute_paths(config).run.output_dir,
        wandb=config.monitor.wandb,
        num_workers=config.cluster.min_workers,
        resources=config.cluster.resources_per_worker,
    )


@dataclass(frozen=True)
class NodeRef:
    """A node of the cluster, as other nodes reach it.

    Attributes:
        label: Its name in messages to the user.
        address: Its IP address.
        port: Port of its raylet.
        host_name: Its name, as Ray knows it.
    """

    label: str
    address: str
    port: int
    host_name: str


@dataclass(frozen=True)
class NodeFacts:
    """Holds what a node found out about itself and its connections.

    Attributes:
        shm_bytes: Size of its shared memory; None if it has none of its own.
        temp_dir: Directory in which Ray keeps logs and spilled objects.
        temp_free_bytes: Free space in it.
        gpus: Number of NVIDIA device files.
        driver: Version of NVIDIA's driver.
        interface: The network interface that has the node's address.
        host_name: Its own host name.
        knows_itself: Whether it resolves that name.
        unknown: Names of other nodes that it cannot resolve.
        unreached: Addresses of other nodes that it cannot connect to.
        free_port: A port on which nothing listens.
        nearest_dir: The nearest directory to `run.output_dir` that exists there.
        output_free_bytes: Free space in it.
        storage_problem: Why a file could not be written, renamed and created exclusively there.
        is_first: Whether this node created the file that only one of all nodes may create.
    """

    shm_bytes: int | None
    temp_dir: str
    temp_free_bytes: int
    gpus: int
    driver: str | None
    interface: str | None
    host_name: str
    knows_itself: bool
    unknown: Sequence[str]
    unreached: Sequence[str]
    free_port: int
    nearest_dir: str | None = None
    output_free_bytes: int | None = None
    storage_problem: str | None = None
    is_first: bool = False


@dataclass(frozen=True)
class SumResult:
    """Holds the result of the all-reduce on one node.

    Attributes:
        bytes_per_s: Speed of its process.
        problem: Why the all-reduce failed; None if it succeeded.
    """

    bytes_per_s: float = 0.0
    problem: str | None = None


@dataclass(frozen=True)
class WandbFacts:
    """Describes where numbers for W&B go, seen from the head.

    Attributes:
        mode: online, offline or disabled.
        host: The server.
        problem: Why a run cannot start with this setting.
        is_reached: Whether the server answers.
    """

    mode: str
    host: str
    problem: str | None = None
    is_reached: bool = False
