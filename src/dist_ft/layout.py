"""The layout of a run directory: all names in it. Owns paths, not contents."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from dist_ft.machine import home_env

FORMAT_VERSION = 1
"""Written as `format_version` into every file that is read back."""
GROWING = ("ledger.jsonl", "metrics.jsonl", "eval.jsonl")
"""Files that rows are appended to; at a URL each is a folder of segments, see `run/sync.py`."""


@dataclass(frozen=True)
class RunDir:
    """Paths of one run: `<run.output_dir>/<run.name>`."""

    path: Path

    @property
    def config(self) -> Path:
        """Resolved config."""
        return self.path / "config.yaml"

    @property
    def sources(self) -> Path:
        """Files of the training sources, as they were when the run began."""
        return self.path / "sources.json"

    @property
    def data(self) -> Path:
        """What each source of the data holds, counted when the run began."""
        return self.path / "data.json"

    @property
    def report(self) -> Path:
        """The page about the run."""
        return self.path / "report.html"

    @property
    def story(self) -> Path:
        """What happened, a line an event."""
        return self.path / "logs" / "story.log"

    @property
    def run_json(self) -> Path:
        """State of the run, rewritten atomically."""
        return self.path / "run.json"

    @property
    def ledger(self) -> Path:
        """Append-only record of attempts, commits and failures."""
        return self.path / "ledger.jsonl"

    @property
    def metrics(self) -> Path:
        """One row per optimizer step."""
        return self.path / "metrics.jsonl"

    @property
    def evals(self) -> Path:
        """One row per evaluation."""
        return self.path / "eval.jsonl"

    @property
    def attempts(self) -> Path:
        """One file per attempt, created exclusively."""
        return self.path / "attempts"

    @property
    def checkpoints(self) -> Path:
        """Parent of the checkpoint directories."""
        return self.path / "checkpoints"

    @property
    def exports(self) -> Path:
        """Parent of exported models."""
        return self.path / "exports"

    @property
    def stop_request(self) -> Path:
        """Exists while somebody asks the run to checkpoint and stop."""
        return self.path / "stop-request.json"

    def checkpoint(self, step: int, attempt: int) -> Path:
        """Directory that `attempt` writes step `step` into."""
        return self.checkpoints / checkpoint_name(step, attempt)

    def export_name(self, step: int) -> str:
        """Name, in the run, of the model exported from `step`."""
        return f"exports/step-{step:08d}"

    def export(self, step: int) -> Path:
        """Directory of the model exported from `step`."""
        return self.path / self.export_name(step)

    def samples(self, step: int) -> Path:
        """Sample answers of the model exported from `step`."""
        return self.path / "samples" / f"step-{step:08d}.jsonl"

    def logs(self, attempt: int) -> Path:
        """Directory of an attempt's logs."""
        return self.path / "logs" / f"attempt-{attempt:04d}"


def checkpoint_name(step: int, attempt: int) -> str:
    """Return `step-00000040-a0003`."""
    return f"step-{step:08d}-a{attempt:04d}"


def slices_name(rank: int, world_size: int) -> str:
    """Return `slices-00000-of-00002.safetensors`."""
    return f"slices-{rank:05d}-of-{world_size:05d}.safetensors"


def rank_log_name(rank: int) -> str:
    """Return `rank-00000.log`."""
    return f"rank-{rank:05d}.log"


def stacks_name(rank: int) -> str:
    """Return `rank-00000.txt`."""
    return f"rank-{rank:05d}.txt"


def user_cache_dir() -> Path:
    """Return `$XDG_CACHE_HOME/dist-ft` or `~/.cache/dist-ft`; see `home_env` where neither can be written."""
    env = {**os.environ, **home_env()}
    return Path(env.get("XDG_CACHE_HOME") or Path(env.get("HOME") or Path.home()) / ".cache") / "dist-ft"
