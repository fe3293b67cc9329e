"""`make lint` fails for a vulnerability, and for nothing else that pip-audit or the network may do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("audit.py")
PROBLEM = {"id": "PYSEC-2026-1", "fix_versions": ["9.9"], "aliases": [], "description": ""}


def said(*packages: dict[str, Any]) -> str:
    return f"print({json.dumps({'dependencies': packages, 'fixes': []})!r})"


@pytest.mark.parametrize(
    ("does", "code", "line"),
    [
        (said({"name": "ray", "version": "2.60.0", "vulns": [PROBLEM]}), 1, "ray 2.60.0: PYSEC-2026-1; fixed in 9.9"),
        (said({"name": "ray", "version": "2.60.0", "vulns": []}), 0, "audit: 0 known vulnerabilities in 1 packages"),
        (said({"name": "ray", "skip_reason": "not found"}), 0, "audit: skipped, not found"),
        ("sys.exit('ConnectionError: no route')", 0, "audit: skipped, ConnectionError: no route"),
        ("sys.exit(3)", 0, "audit: skipped, pip-audit says nothing"),
    ],
)
def test_what_pip_audit_says_decides(tmp_path: Path, does: str, code: int, line: str) -> None:
    tool = tmp_path / "pip-audit"
    tool.write_text(f"#!{sys.executable}\nimport sys\n{does}\n")
    tool.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [sys.executable, "-S", str(SCRIPT)], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout.splitlines()[0]) == (code, line), done.stderr
