"""Connects to the Ray that serves: a cluster, or one that is started on this machine."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
from pathlib import Path

import ray

from dist_ft.errors import UsageError
from dist_ft.machine import local_slots
from dist_ft.orchestrate.driver.connect import check_address

_OBJECT_STORE_BYTES = 100_000_000  # for messages only


def connect(address: str | None, scratch: Path) -> None:
    """Connect to a cluster, or start Ray here.

    Args:
        address: `host:port` of a cluster; None starts Ray here.
        scratch: Directory without Python files, see `orchestrate/driver/connect.py`.

    Raises:
        UsageError: No cluster answers.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address is None:
        os.environ["RAY_enable_worker_prestart"] = "0"
        os.environ["RAY_prestart_worker_first_driver"] = "0"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        with contextlib.chdir(scratch):
            ray.init(
                address="local", num_cpus=local_slots(), include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES, logging_level=logging.ERROR, log_to_driver=False,
                namespace="dist-ft-serve",
            )  # fmt: skip
        return
    check_address(address)
    try:
        with contextlib.chdir(scratch):
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, namespace="dist-ft-serve")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UsageError(
            f"--address {address}: {str(error).splitlines()[0]}; check that it is a Ray of version {ray.__version__}, "
            "and RAY_AUTH_TOKEN if it asks for a token"
        ) from error
