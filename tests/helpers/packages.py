"""What packages need one another, as they are installed here."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from importlib import metadata

from packaging.requirements import Requirement

from tests.helpers.paths import ROOT


def normal(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(requirements: Iterable[str]) -> dict[str, str]:
    """Returns name → version of all packages that some requirements bring along on this machine."""
    waiting = [Requirement(line) for line in requirements]
    seen: set[tuple[str, str]] = set()
    found: dict[str, str] = {}
    while waiting:
        wanted = waiting.pop()
        for extra in ("", *wanted.extras):
            if (normal(wanted.name), extra) in seen:
                continue
            seen.add((normal(wanted.name), extra))
            found[normal(wanted.name)] = metadata.version(wanted.name)
            needed = map(Requirement, metadata.requires(wanted.name) or [])
            waiting += [r for r in needed if r.marker is None or r.marker.evaluate({"extra": extra})]
    return found


def pins() -> list[tuple[str, str]]:
    """Returns `(name, version)` of every line of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    split = [line.split("==") for line in lines if line and not line.startswith("#")]
    return [(normal(name), version) for name, version in split]


def requirements_of_the_project() -> list[str]:
    """What `make setup` installs, the packages that it names itself among it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras: dict[str, list[str]] = project["optional-dependencies"]
    own = {f"{project['name']}[{name}]": lines for name, lines in extras.items()}
    asked = [line for name in ("embedded", "dev") for line in extras[name]]
    while named := [line for line in asked if line in own]:  # an extra may hold another
        asked = [line for line in asked if line not in own] + [line for name in named for line in own[name]]
    return [*project["dependencies"], *asked]
