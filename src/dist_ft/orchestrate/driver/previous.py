"""Reads what an earlier driver of the run left: its result, model commit, sources and settings. Ray-free."""

from __future__ import annotations

from dist_ft.checkpoint.lineage import committed
from dist_ft.config import Config, load_config, with_commit
from dist_ft.coordinator.start import check_length, check_resume
from dist_ft.data.sources.listing import check_frozen
from dist_ft.data.sources.source_file import SourceFile
from dist_ft.jobs.spec import SourceFiles
from dist_ft.layout import RunDir
from dist_ft.run.outcome import RunResult
from dist_ft.run.place import Run
from dist_ft.run.run_inputs import RunInputs
from dist_ft.storage.publish import read_json


def find_finished(config: Config, run_dir: Run) -> RunResult | None:
    """Return the result of a run that is already complete, at the end that the config asks for."""
    if not run_dir.run_json.exists():
        return None
    record = read_json(run_dir.run_json)
    if record["state"] != "completed":
        return None
    stored = load_config(run_dir.config)
    if (stored.train.max_steps, stored.train.epochs) != (config.train.max_steps, config.train.epochs):
        return None
    # Early stopping must be the same only if the run did stop early.
    if record["step"] < record["max_steps"] and stored.eval.early_stopping != config.eval.early_stopping:
        return None
    return RunResult(run_dir.address, "completed", record["step"], attempts=record["attempt"], **record["result"])


def with_recorded_commit(config: Config, run_dir: Run) -> Config:
    """Return the config with the commit that the run began with, if it asks for the same model and revision."""
    if config.model.commit is not None or not run_dir.config.exists():
        return config
    began = load_config(run_dir.config).model
    is_same = (began.name, began.revision) == (config.model.name, config.model.revision)
    return with_commit(config, began.commit) if is_same else config


def check_sources(run_dir: RunDir, files: SourceFiles) -> None:
    """Check that the training sources have not changed since the run began.

    Args:
        run_dir: The run; it may be a new one.
        files: The files of each source.

    Raises:
        DataError: A file has changed; the message names the first one.
    """
    if not run_dir.sources.exists():
        return
    frozen = read_json(run_dir.sources)["files"]
    for before, now in zip(frozen, files, strict=False):  # the fingerprint refuses another number of sources
        check_frozen([SourceFile.from_dict(file) for file in before], now)


def check_resumed(config: Config, run_dir: Run, inputs: RunInputs) -> int:
    """Check that the run can continue from its checkpoints; return the step of the last one, or 0 if there is none.

    Raises:
        UserError: The config does not fit the checkpoints; the message has both values.
    """
    checkpoints = committed(run_dir.store)
    if not checkpoints:
        return 0
    check_resume(checkpoints[-1], inputs.fingerprint)
    check_length(checkpoints, config.train.global_batch_size, inputs.max_steps, inputs.num_positions)
    return checkpoints[-1].step


def changed_settings(config: Config, run_dir: Run) -> list[str]:
    """Return `key: old → new` for each setting that differs from the last attempt's config."""
    if not run_dir.config.exists():
        return []
    old, new = load_config(run_dir.config).model_dump(mode="json"), config.model_dump(mode="json")
    return [
        f"{section}.{key}: {old[section].get(key)} → {value}"
        for section, values in new.items()
        for key, value in values.items()
        if old[section].get(key) != value
    ]
