"""Where a driver's start-up went, and what an earlier driver of the run left. Ray-free."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from dist_ft.config import Config, load_config, with_commit
from dist_ft.data.sources.listing import check_frozen
from dist_ft.data.sources.source_file import SourceFile
from dist_ft.jobs.spec import SourceFiles
from dist_ft.layout import RunDir, read_json
from dist_ft.run.outcome import RunResult
from dist_ft.run.place import Run


@dataclass
class Timeline:
    """Seconds since the driver began, by what had happened."""

    began: float
    marks: dict[str, float] = field(default_factory=dict)

    def mark(self, name: str) -> None:
        """Notes that something has happened, once."""
        self.marks.setdefault(name, round(time.monotonic() - self.began, 2))

    def describe(self) -> str:
        """Returns `ray 3.1 s, prepared 6.0 s, …`."""
        return ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.marks.items())


def find_finished(config: Config, run_dir: Run) -> RunResult | None:
    """Returns the result of a run that is complete already, with the end that the config asks for."""
    if not run_dir.run_json.exists():
        return None
    record = read_json(run_dir.run_json)
    if record["state"] != "completed" or not _asks_for_same_end(config, run_dir, record):
        return None
    return RunResult(
        run_dir=run_dir.address,
        state="completed",
        steps=record["step"],
        attempts=record["attempt"],
        **record["result"],
    )


def with_recorded_commit(config: Config, run_dir: Run) -> Config:
    """Returns the config at the commit that the run began with, if it asks for the same model and revision."""
    if config.model.commit is not None or not run_dir.config.exists():
        return config
    began = load_config(run_dir.config).model
    is_same = (began.name, began.revision) == (config.model.name, config.model.revision)
    return with_commit(config, began.commit) if is_same else config


def check_sources(run_dir: RunDir, files: SourceFiles) -> None:
    """Checks that the training sources are what they were when the run began.

    Args:
        run_dir: Of the run; it may be a new one.
        files: Of each source.

    Raises:
        DataError: With the first file that is not.
    """
    if not run_dir.sources.exists():
        return
    frozen = read_json(run_dir.sources)["files"]
    for before, now in zip(frozen, files, strict=False):  # another number of sources is the fingerprint's to refuse
        check_frozen([SourceFile.from_dict(file) for file in before], now)


def changed_settings(config: Config, run_dir: Run) -> list[str]:
    """Returns `key: old → new` for what differs from the last attempt's config."""
    if not run_dir.config.exists():
        return []
    old, new = load_config(run_dir.config).model_dump(mode="json"), config.model_dump(mode="json")
    return [
        f"{section}.{key}: {old[section].get(key)} → {value}"
        for section, values in new.items()
        for key, value in values.items()
        if old[section].get(key) != value
    ]


def persistent(result: dict[str, Any]) -> dict[str, Any]:
    """What run.json keeps of a result; samples are for the screen."""
    kept = dict(result)
    if kept.get("evaluation"):
        kept["evaluation"] = {k: v for k, v in kept["evaluation"].items() if k != "samples"}
    return kept


def _asks_for_same_end(config: Config, run_dir: Run, record: dict[str, Any]) -> bool:
    stored = load_config(run_dir.config)
    if (stored.train.max_steps, stored.train.epochs) != (config.train.max_steps, config.train.epochs):
        return False
    # Whether the run would have stopped where it did is asked only where it did stop early.
    has_all_steps: bool = record["step"] >= record["max_steps"]
    return has_all_steps or stored.eval.early_stopping == config.eval.early_stopping
