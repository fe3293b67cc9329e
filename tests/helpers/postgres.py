"""A PostgreSQL server of the test's own, on a socket in a directory of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def own_postgres() -> Iterator[str]:
    """Serves until the block ends; yields the URL of an empty database. Skips where PostgreSQL is not installed."""
    pytest.importorskip("psycopg", reason="psycopg is not installed (make service-postgres)")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
    if not found:
        pytest.skip("Debian's postgresql is not installed")
    programs = found[-1].parent
    # The server refuses to run as root.
    as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.geteuid() == 0 else []
    folder = Path(tempfile.mkdtemp(prefix="dist-ft-postgres-"))
    if as_user:
        shutil.chown(folder, "postgres", "postgres")

    def call(program: str, *arguments: str) -> None:
        subprocess.run(
            [*as_user, programs / program, "-D", folder / "data", *arguments], check=True, stdout=subprocess.DEVNULL
        )

    try:
        call("initdb", "--auth=trust", "--username=postgres")
        call("pg_ctl", "--wait", "-o", f"-c listen_addresses='' -k {folder}", "-l", str(folder / "log"), "start")
        yield f"postgresql+psycopg://postgres@/postgres?host={folder}"
        call("pg_ctl", "--wait", "-m", "fast", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
