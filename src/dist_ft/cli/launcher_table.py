"""The table of launchers. Nothing else in the command line knows them by name.

The prefix of a job's name says which launcher it belongs to: `slurm:17`, `kubernetes:dist-ft/mine-a1b2c`,
`local:mine-20261126`. Jobs of Ray have the submission ids that Ray shows, without a prefix; a name without a prefix is
one of these if a dashboard is known.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dist_ft.errors import UsageError

if TYPE_CHECKING:
    from dist_ft.launchers.launcher import Launcher


@dataclass(frozen=True)
class LauncherOptions:
    """Options of `submit` that belong to one launcher each.

    Attributes:
        address: Ray: URL of a dashboard.
        overlay: Kubernetes: Kustomization directory.
        namespace: Kubernetes: where the run goes.
        image: Kubernetes: in place of the overlay's.
        template: Slurm: batch script.
        sbatch: Slurm: options of sbatch.
    """

    address: str | None = None
    overlay: Path | None = None
    namespace: str = "dist-ft"
    image: str | None = None
    template: Path | None = None
    sbatch: tuple[str, ...] = ()


def _ray(options: LauncherOptions) -> Launcher:
    from dist_ft.launchers.ray.jobs import RayLauncher

    return RayLauncher(options.address)


def _kubernetes(options: LauncherOptions) -> Launcher:
    from dist_ft.launchers.kubernetes.job import KubernetesLauncher

    return KubernetesLauncher(options.overlay, options.namespace, options.image)


def _slurm(options: LauncherOptions) -> Launcher:
    from dist_ft.launchers.slurm import SlurmLauncher

    return SlurmLauncher(options.template, options.sbatch)


def _local(options: LauncherOptions) -> Launcher:
    from dist_ft.launchers.local import LocalLauncher

    return LocalLauncher()


LAUNCHERS: dict[str, Callable[[LauncherOptions], Launcher]] = {
    "ray": _ray,
    "kubernetes": _kubernetes,
    "slurm": _slurm,
    "local": _local,
}


def complete_launcher(incomplete: str) -> list[str]:
    """Return the launchers whose names begin so."""
    return [name for name in LAUNCHERS if name.startswith(incomplete)]


def launcher_named(name: str, options: LauncherOptions) -> Launcher:
    """Return the launcher that `--to` names."""
    if name not in LAUNCHERS:
        raise UsageError(f"--to {name} is none of {', '.join(LAUNCHERS)}")
    return LAUNCHERS[name](options)


def launcher_of(run: str, address: str | None) -> Launcher | None:
    """Return the launcher of the job that RUN names; None if RUN is a run directory.

    Args:
        run: Path or URL of a run, or name of a job.
        address: URL of a Ray dashboard; Ray's own variables count, too.
    """
    scheme, colon, _ = run.partition(":")
    if colon and scheme in LAUNCHERS:
        return LAUNCHERS[scheme](LauncherOptions())
    is_one_word = len(Path(run).parts) == 1 and not Path(run).exists()
    is_cluster_named = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    return _ray(LauncherOptions(address)) if is_one_word and is_cluster_named else None
