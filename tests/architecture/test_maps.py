"""The maps are true: README has a line a folder of the source tree, each folder's README a line a module."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

SOURCE = ROOT / "src" / "dist_ft"
FOLDERS = sorted({path.parent for path in SOURCE.rglob("*.py") if path.name != "__init__.py"})
PACKAGES = sorted({path.parent for path in SOURCE.rglob("__init__.py")})


def _named_in(readme: Path) -> set[str]:
    """Returns the names that begin a bullet (`- `name`: …`) or a row of a table (`| `name` | …`)."""
    return set(re.findall(r"^(?:- |\| )`([\w/]+)`", readme.read_text(encoding="utf-8"), re.MULTILINE))


def test_the_map_has_a_line_a_folder() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    linked = {Path(path) for path in re.findall(r"^\| \[`[\w./]+`\]\(src/dist_ft/(.*)README\.md\)", text, re.MULTILINE)}
    assert linked == {folder.relative_to(SOURCE) for folder in PACKAGES}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.relative_to(SOURCE).as_posix())
def test_a_folder_readme_names_every_module_and_no_other(folder: Path) -> None:
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    folders = {path.name for path in folder.iterdir() if path.is_dir()}
    assert modules == _named_in(folder / "README.md") - folders


PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *SOURCE.rglob("*.md"), *(ROOT / "cluster").rglob("*.md")]
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_paths_in_docs_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [page.parent / link for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text)]
    assert not [link for link in links if not link.exists()]
    paths = re.findall(r"`((?:\w+/)+\w+\.(?:py|md|yaml|sbatch|sh))`", text)
    roots = (ROOT, SOURCE, SOURCE / "data", page.parent)
    assert not [path for path in paths if not any((root / path).exists() for root in roots)]
