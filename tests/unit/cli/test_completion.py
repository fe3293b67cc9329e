"""What a shell is offered after TAB: verbs, options, and the run directories that are there."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from dist_ft.cli.app import app


def offered(line: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Asks as bash does: the words so far, the last of them under the cursor."""
    words = line.split(" ")
    monkeypatch.setenv("_DIST_FT_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
    return CliRunner().invoke(app, prog_name="dist-ft").output.split()


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("runs/full/run.json", "runs/lora/run.json", "runs/no-run/notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("dist-ft st", ["status", "stop"]),
        ("dist-ft checkpoint ", ["ls", "verify", "tag", "rm", "import"]),
        ("dist-ft train --res", ["--resume"]),
        ("dist-ft status run", ["runs/full", "runs/lora"]),
        ("dist-ft watch runs/", ["runs/full", "runs/lora"]),
        ("dist-ft checkpoint ls runs/l", ["runs/lora"]),
        ("dist-ft stop elsewhere", []),
        ("dist-ft train conf", []),  # the shell's own files
    ],
)
def test_a_shell_is_offered(line: str, words: list[str], runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert offered(line, monkeypatch) == words


def test_runs_of_other_places_are_offered_by_their_whole_path(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert offered(f"dist-ft status {runs}/runs/f", monkeypatch) == [f"{runs}/runs/full"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_for_a_shell_is_printed(shell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    printed = CliRunner().invoke(app, ["--show-completion", shell], prog_name="dist-ft")
    assert printed.exit_code == 0
    assert "_DIST_FT_COMPLETE" in printed.output
