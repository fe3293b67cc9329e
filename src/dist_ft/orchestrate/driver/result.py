"""What a run of the driver comes to: its result, where its start-up went, and what an earlier one left. Ray-free."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dist_ft import errors
from dist_ft.config import Config, load_config, with_commit
from dist_ft.data.sources.listing import check_frozen
from dist_ft.data.sources.source_file import SourceFile
from dist_ft.layout import RunDir, read_json
from dist_ft.run.place import RunPlace


@dataclass
class RunResult:
    """What `dist-ft train --json` prints.

    Attributes:
        run_dir: Path or URL of the run.
        state: completed, stopped or failed.
        steps: Completed steps.
        final_loss: Training loss of the last step.
        eval_loss: Held-out loss after the last step, if measured.
        export_dir: The exported model, if any.
        attempts: Attempts so far.
        error: `{type, message}` of a failed run.
        evaluation: Result of `tasks.results.merge`, if asked for.
        train_s: Seconds from the first step's start to the end of training in this attempt.
        comparison: What is known of the base model, the tuned one and the best one: name → metric → value.
        early_stop: `{metric, best_step, patience}` of a run that ended before its last step.
        best_step: Step of `exports/best`, if asked for.
        best_dir: Its directory.
    """

    run_dir: str
    state: str
    steps: int = 0
    final_loss: float | None = None
    eval_loss: float | None = None
    export_dir: str | None = None
    attempts: int = 0
    error: dict[str, str] | None = None
    evaluation: dict[str, Any] | None = None
    train_s: float | None = None
    comparison: dict[str, dict[str, float | None]] = field(default_factory=dict)
    early_stop: dict[str, Any] | None = None
    best_step: int | None = None
    best_dir: str | None = None

    @property
    def exit_code(self) -> int:
        """Process exit code: 0 completed, 3 stopped, else the error's own."""
        if self.error is not None:
            return errors.from_dict(self.error).exit_code
        return {"completed": 0, "stopped": 3}.get(self.state, 1)


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


def find_finished(config: Config, run_dir: RunPlace) -> RunResult | None:
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


def with_recorded_commit(config: Config, run_dir: RunPlace) -> Config:
    """Returns the config at the commit that the run began with, if it asks for the same model and revision."""
    if config.model.commit is not None or not run_dir.config.exists():
        return config
    began = load_config(run_dir.config).model
    is_same = (began.name, began.revision) == (config.model.name, config.model.revision)
    return with_commit(config, began.commit) if is_same else config


def check_sources(run_dir: RunDir, files: Sequence[Sequence[Mapping[str, Any]]]) -> None:
    """Checks that the training sources are what they were when the run began.

    Args:
        run_dir: Of the run; it may be a new one.
        files: Of each source, as `SourceFile.to_dict` gives them.

    Raises:
        DataError: With the first file that is not.
    """
    if not run_dir.sources.exists():
        return
    frozen = read_json(run_dir.sources)["files"]
    for before, now in zip(frozen, files, strict=False):  # another number of sources is the fingerprint's to refuse
        check_frozen([SourceFile.from_dict(file) for file in before], [SourceFile.from_dict(file) for file in now])


def changed_settings(config: Config, run_dir: RunPlace) -> list[str]:
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


def _asks_for_same_end(config: Config, run_dir: RunPlace, record: dict[str, Any]) -> bool:
    stored = load_config(run_dir.config)
    if (stored.train.max_steps, stored.train.epochs) != (config.train.max_steps, config.train.epochs):
        return False
    # Whether the run would have stopped where it did is asked only where it did stop early.
    has_all_steps: bool = record["step"] >= record["max_steps"]
    return has_all_steps or stored.eval.early_stopping == config.eval.early_stopping
