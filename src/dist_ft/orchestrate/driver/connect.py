"""Connects to Ray, or starts Ray on this machine, and checks whether the workers can ever fit."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path

import ray

from dist_ft.config import Config
from dist_ft.errors import CapacityError, UsageError
from dist_ft.machine import has_fast_bfloat16, local_slots, num_cores, worker_resources, workers_on
from dist_ft.orchestrate.workers.ray_group import TRAIN_ENV, start_env

_CONNECT_LIMIT_S = 5.0
_OBJECT_STORE_BYTES = 100_000_000  # for messages only; data and weights never pass through it


@dataclass(frozen=True)
class ClusterInfo:
    """The cluster that the driver is connected to.

    Attributes:
        on_gpu: Whether workers get GPUs.
        resources: Ray resources of one worker.
        warnings: Lines for the user.
    """

    on_gpu: bool
    resources: dict[str, float]
    warnings: tuple[str, ...] = ()


def connect(config: Config, scratch: Path) -> ClusterInfo:
    """Connect to `cluster.address`, or start Ray on this machine.

    Args:
        config: The run config, with absolute paths.
        scratch: Directory without Python files that stays until this returns. Ray puts the current directory into the
            path of its workers, where a `random.py` of the user's would take the place of Python's, so this one is
            current meanwhile.

    Raises:
        UsageError: No cluster answers at the address.
        CapacityError: The cluster could never hold the workers.
    """
    os.environ.update(TRAIN_ENV | start_env(config.cluster.max_workers))
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the future default; silences a warning
    address = config.cluster.address
    if address is None:
        # Otherwise Ray starts a Python process for each CPU slot at once; the few that are needed start on demand.
        os.environ["RAY_enable_worker_prestart"] = "0"
        os.environ["RAY_prestart_worker_first_driver"] = "0"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # or Ray writes one into the home directory
        with contextlib.chdir(scratch):
            ray.init(
                address="local",
                num_cpus=local_slots(),
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                logging_level=logging.ERROR,
                log_to_driver=False,
                namespace=config.run.name,
            )
    else:
        check_address(address)
        try:
            with contextlib.chdir(scratch):
                ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, namespace=config.run.name)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UsageError(
                f"cluster.address={address}: {str(error).splitlines()[0]}; check that it is a Ray of version "
                f"{ray.__version__}, and RAY_AUTH_TOKEN if it asks for a token"
            ) from error
    return _check_capacity(config)


def check_address(address: str) -> None:
    """Check within seconds that something listens at `host:port`; Ray would take minutes to find out.

    Raises:
        UsageError: Nothing listens there; the message has the address and the reason.
    """
    host, _, port = address.rpartition(":")
    if address == "auto":
        return
    if "://" in address or not port.isdigit():
        raise UsageError(
            f"cluster.address={address} is not host:port of a Ray head, nor `auto`; run dist-ft on a machine of the "
            "cluster, or use a Ray job"
        )
    try:
        socket.create_connection((host, int(port)), _CONNECT_LIMIT_S).close()
    except OSError as error:
        raise UsageError(f"cluster.address={address}: no Ray cluster answers there ({error})") from error


def _check_capacity(config: Config) -> ClusterInfo:
    total = ray.cluster_resources()
    resources = worker_resources(config.cluster.resources_per_worker, has_gpu=total.get("GPU", 0) > 0)
    wanted = config.cluster.min_workers
    for name, amount in resources.items():
        if amount * wanted > total.get(name, 0):
            raise CapacityError(
                f"cluster.num_workers={config.cluster.num_workers} needs {amount * wanted:g} {name}, the cluster has "
                f"{total.get(name, 0):g}; lower it, or add machines"
            )
    on_gpu = resources.get("GPU", 0) > 0
    fits = workers_on(total, resources)
    possible = config.cluster.max_workers if fits is None else min(config.cluster.max_workers, fits)
    cores = num_cores()
    warnings = []
    if config.cluster.address is None and not on_gpu and possible > cores:
        warnings.append(f"{possible} workers share {cores} cores; this is for trying out, not for speed")
    if config.model.torch_dtype == "bfloat16" and not on_gpu and not has_fast_bfloat16():
        warnings.append("this CPU has no instructions for model.dtype=bfloat16; float32 is some 20 times as fast")
    return ClusterInfo(on_gpu, resources, tuple(warnings))
