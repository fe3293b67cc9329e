"""Runs `kubectl` with a time limit, and turns its failures into errors of one line."""

from __future__ import annotations

from dist_ft.launchers.command import run_command

KUBECTL_LIMIT_S = 120.0


def kubectl(*arguments: str, stdin: str | None = None, limit_s: float = KUBECTL_LIMIT_S) -> str:
    """Run kubectl and return what it prints.

    Raises:
        UsageError: There is no kubectl.
        DistFtError: It failed, with its own words, or did not end within the limit.
    """
    return run_command(
        ["kubectl", *arguments],
        shown=f"kubectl {arguments[0]}",
        absent="install it (any version from 1.28) and point it at the cluster",
        question="is the cluster there?",
        limit_s=limit_s,
        stdin=stdin,
    )
