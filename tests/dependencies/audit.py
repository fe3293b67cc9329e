"""`make lint`: looks for known vulnerabilities of the pins, where that can be done; else says in a line why not.

Exit code 1 for a vulnerability that was found, never for lack of a network or of pip-audit.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"
IGNORED: dict[str, str] = {}
"""Id of an advisory → why it does not matter here."""
_LIMIT_S = 120.0
_PROBE = "packaging==24.0\n"


def audit(tool: str, requirements: str) -> list[dict[str, Any]] | str:
    """Returns what pip-audit found of each package, or why it found nothing out."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(requirements)
        file.flush()
        command = [
            tool,
            "-r",
            file.name,
            "--no-deps",
            "--disable-pip",
            "--progress-spinner=off",
            "-f",
            "json",
            "--timeout=10",
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
        except subprocess.TimeoutExpired:
            return f"no answer within {_LIMIT_S:.0f} s"
    try:
        found: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        return (done.stderr.strip().splitlines() or ["pip-audit says nothing"])[-1][:200]
    return found


def main() -> int:
    """Prints a line, or one for each vulnerability; returns the exit code."""
    tool = shutil.which("pip-audit", path=f"{os.environ['PATH']}{os.pathsep}{Path(sys.executable).parent}")
    if tool is None:
        return _skip("pip-audit is not installed")
    probe = audit(tool, _PROBE)  # one question, before there are a hundred
    if isinstance(probe, str):
        return _skip(probe)
    if any("skip_reason" in package for package in probe):
        return _skip(str(probe[0]["skip_reason"]))
    found = audit(tool, CONSTRAINTS.read_text())
    if isinstance(found, str):
        return _skip(found)
    known = [
        (package, problem) for package in found for problem in package.get("vulns", []) if problem["id"] not in IGNORED
    ]
    for package, problem in known:
        fixed = ", ".join(problem["fix_versions"]) or "none yet"
        print(f"{package['name']} {package['version']}: {problem['id']}; fixed in {fixed}")
    print(f"audit: {len(known)} known vulnerabilities in {len(found)} packages")
    return 1 if known else 0


def _skip(reason: str) -> int:
    print(f"audit: skipped, {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
