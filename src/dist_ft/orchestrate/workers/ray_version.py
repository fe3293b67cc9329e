"""Checks the version of Ray. Imported before anything of Ray is: another version may lack a name on import."""

from __future__ import annotations

from importlib.metadata import version

from dist_ft.errors import UsageError

SERIES = "2.60"
"""As in pyproject.toml. `orchestrate/` uses private names of Ray Train (tests/contracts/test_ray_names.py)."""


def check_ray_version(found: str | None = None) -> None:
    """Raise UsageError unless the installed Ray, or the one given, is of the series."""
    found = found or version("ray")
    if found.split(".")[:2] != SERIES.split("."):
        raise UsageError(
            f"Ray {found} is installed; dist-ft replaces private parts of Ray Train and works with {SERIES}.* only: "
            f"pip install 'ray[default,train]=={SERIES}.*' on every machine of the cluster"
        )
