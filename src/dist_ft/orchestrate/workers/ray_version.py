"""Checks the version of Ray. It is imported before anything of Ray, because another version may lack a name."""

from __future__ import annotations

from importlib.metadata import version

from dist_ft.errors import UsageError

SERIES = "2.60"
"""Series in pyproject.toml. `orchestrate/` uses private names of Ray Train (tests/contracts/test_ray_names.py)."""


def check_ray_version(found: str | None = None) -> None:
    """Raise UsageError unless the installed Ray (or the given version) is of the series."""
    found = found or version("ray")
    if found.split(".")[:2] != SERIES.split("."):
        raise UsageError(
            f"Ray {found} is installed; dist-ft replaces private parts of Ray Train and works with {SERIES}.* only: "
            f"pip install 'ray[default,train]=={SERIES}.*' on every machine of the cluster"
        )
