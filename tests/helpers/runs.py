"""Runs of the real command on a Ray, to be disturbed and compared."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_ft.checkpoint.lineage import committed
from dist_ft.layout import RunDir
from dist_ft.storage.publish import read_json
from dist_ft.storage.store import LocalStore
from tests.helpers.paths import ROOT
from tests.helpers.rows import last_rows, read_rows

CONFIG = ROOT / "configs" / "smoke" / "full.yaml"


SHADOWING = ("random.py", "types.py", "logging.py", "ray.py", "torch.py")
"""Files that a user may well have in the directory where he starts a run. None may take the place of a library."""


class Run:
    """One `dist-ft train` in the background; `env` is added to this process's environment.

    The current directory holds modules named like libraries.
    """

    command: tuple[str, ...] = ("train", "--json")

    def __init__(
        self, cli: str, output_dir: Path, address: str, name: str, *overrides: str, env: dict[str, str] | None = None
    ) -> None:
        self.dir = RunDir(output_dir / name)
        settings = [f"run.output_dir={output_dir}", f"run.name={name}", f"cluster.address={address}", "data.eval=null",
                    "eval.metrics=[]", "monitor.wandb=disabled", *overrides]  # fmt: skip
        here = output_dir / "here"
        here.mkdir(parents=True, exist_ok=True)
        for name in SHADOWING:
            (here / name).write_text("raise SystemExit(f'{__file__} was imported')")
        self.process = subprocess.Popen(
            [cli, self.command[0], str(CONFIG), *self.command[1:], *settings],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **(env or {})}, cwd=here,
        )  # fmt: skip

    def wait_for(self, condition: Callable[[dict[str, Any]], bool], limit_s: float = 300.0) -> dict[str, Any]:
        """Waits until run.json fulfils a condition, and returns it."""
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.process.communicate()
            if self.dir.run_json.exists() and condition(record := read_json(self.dir.run_json)):
                return record
            time.sleep(0.05)
        raise AssertionError(f"{self.dir.run_json} did not get there within {limit_s:.0f} s")

    def finish(self, limit_s: float = 500.0) -> tuple[int, dict[str, Any], str]:
        """Returns exit code, result and standard error."""
        out, err = self.process.communicate(timeout=limit_s)
        assert out, err
        return self.process.returncode, json.loads(out.splitlines()[-1]), err

    def rows(self) -> dict[int, dict[str, Any]]:
        """The row of each step that counts."""
        return last_rows(self.dir.metrics)

    def all_rows(self) -> list[dict[str, Any]]:
        """Every row, also those of steps that were made again."""
        return list(read_rows(self.dir.metrics))

    def state(self) -> list[str]:
        """Hashes of the slice files of the last checkpoint."""
        return [file.xxh3 for file in committed(LocalStore(self.dir.path))[-1].files]

    def events(self, name: str) -> list[dict[str, Any]]:
        """Ledger entries of one kind."""
        return [entry for entry in read_rows(self.dir.ledger) if entry["event"] == name]
