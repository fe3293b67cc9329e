"""A `kubectl` on PATH that writes down what it is asked and answers from files: for logic only, it knows no cluster."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

_SCRIPT = """#!{python}
import json, sys
from pathlib import Path
folder = Path({folder!r})
arguments = sys.argv[1:]
stdin = sys.stdin.read() if "-" in arguments else ""
with (folder / "calls.jsonl").open("a") as file:
    file.write(json.dumps({{"arguments": arguments, "stdin": stdin}}) + "\\n")
answers = json.loads((folder / "answers.json").read_text())
for number, (words, said, code) in enumerate(answers):
    if all(word in arguments for word in words):
        answers.pop(number)
        (folder / "answers.json").write_text(json.dumps(answers))
        print(said, end="", file=sys.stderr if code else sys.stdout)
        sys.exit(code)
"""


class FakeKubectl:
    """Answers each call with the first answer left whose words are all among its arguments, else with nothing."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder = folder
        script = folder / "kubectl"
        script.write_text(_SCRIPT.format(python=sys.executable, folder=str(folder)))
        script.chmod(0o755)
        self.answer([])
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def answer(self, answers: Sequence[tuple[Sequence[str], Any, int]]) -> None:
        """Sets `(words, answer, exit code)` to be used once each; what is no text is written as JSON."""
        written = [(words, said if isinstance(said, str) else json.dumps(said), code) for words, said, code in answers]
        (self._folder / "answers.json").write_text(json.dumps(written))

    @property
    def calls(self) -> list[list[str]]:
        """Arguments of every call so far."""
        return [call["arguments"] for call in self._read()]

    @property
    def applied(self) -> list[dict[str, Any]]:
        """The objects that were applied for good."""
        return [
            item
            for call in self._read()
            if call["arguments"][0] == "apply" and "--dry-run=server" not in call["arguments"]
            for item in json.loads(call["stdin"])["items"]
        ]

    def _read(self) -> list[dict[str, Any]]:
        log = self._folder / "calls.jsonl"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
