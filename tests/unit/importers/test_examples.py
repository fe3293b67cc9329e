"""How many of the other tools' example configs are imported, which docs/import.md says in a table.

The examples are no part of this project: they are looked for in $DIST_FT_EXAMPLES, then in ../shared/data beside it.
"""

from __future__ import annotations

import collections
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from dist_ft.config.yaml_file import read_yaml
from dist_ft.errors import UserError
from dist_ft.importers.run_import import Tool, import_file, nested
from dist_ft.importers.verdicts import Options
from dist_ft.importers.written import config_text
from tests.helpers.paths import ROOT

EXAMPLES = Path(os.environ.get("DIST_FT_EXAMPLES") or ROOT.parent / "shared" / "data")
GENEROUS = Options(unquantised=True, trust_remote_code=True)
TABLE: tuple[tuple[str, Tool, str, Options], ...] = (
    ("Axolotl, as they are", "axolotl", "axolotl-examples/examples", Options()),
    ("Axolotl, `--unquantised --trust-remote-code`", "axolotl", "axolotl-examples/examples", GENEROUS),
    (
        "LLaMA-Factory, `--unquantised --trust-remote-code --dataset-dir data`",
        "llamafactory",
        "llamafactory-examples/examples",
        replace(GENEROUS, dataset_dir=EXAMPLES / "llamafactory-examples" / "data"),
    ),
)
"""The rows of the table: their names there, the tool, the folder and the options."""


def count(tool: Tool, folder: Path, options: Options, out: Path) -> list[int]:
    """Returns how many files become same, close, refused, and no training config of this tool."""
    found: collections.Counter[str] = collections.Counter()
    for path in sorted(folder.rglob("*.y*ml")):
        try:
            result = import_file(tool, path, options)
        except UserError:
            found["none"] += 1
            continue
        out.write_text(config_text(result))
        assert read_yaml(out) == nested(result.settings), path
        verdicts = {finding.outcome.verdict for finding in result.findings}
        found["refused" if "refused" in verdicts else "close" if "close" in verdicts else "same"] += 1
    return [found[name] for name in ("same", "close", "refused", "none")]


@pytest.mark.parametrize(("name", "tool", "folder", "options"), TABLE, ids=[row[0] for row in TABLE])
def test_the_table_counts_the_examples(name: str, tool: Tool, folder: str, options: Options, tmp_path: Path) -> None:
    if not (EXAMPLES / folder).is_dir():
        pytest.skip(f"the examples of other tools are no part of this project, and not in {EXAMPLES}")
    text = (ROOT / "docs" / "import.md").read_text(encoding="utf-8")
    row = re.search(rf"^\| {re.escape(name)} \|(.*)\|$", text, re.MULTILINE)
    assert row is not None
    counted = count(tool, EXAMPLES / folder, options, tmp_path / "ours.yaml")
    assert [int(cell) for cell in row[1].split("|")] == counted


def test_most_of_llamafactorys_text_examples_are_imported() -> None:
    """docs/import.md says how many, and what stops the others."""
    _, tool, folder, options = TABLE[-1]
    if not (EXAMPLES / folder).is_dir():
        pytest.skip(f"the examples of other tools are no part of this project, and not in {EXAMPLES}")
    stopped: collections.Counter[str] = collections.Counter()
    for path in sorted((EXAMPLES / folder).rglob("*.yaml")):
        raw = read_yaml(path)
        if raw.get("stage") not in ("sft", "dpo", "kto") or "dataset" not in raw:
            continue
        refused = {finding.key: finding.outcome.why for finding in import_file(tool, path, options).refused}
        if "has images" not in refused.get("dataset", ""):
            stopped[next(iter(refused), "imported")] += 1
    text = (ROOT / "docs" / "import.md").read_text(encoding="utf-8")
    told = {
        key: int(count) for count, key in re.findall(r"(\d+) `([a-z_]+)`", text[text.index("What stops the others") :])
    }
    assert told == {key: count for key, count in stopped.items() if key != "imported"}
    assert f"**{stopped['imported']} of {stopped.total()}**" in text
    assert stopped["imported"] >= 0.6 * stopped.total()
