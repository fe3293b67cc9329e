"""Reads all that a page says of a run, from the files of its directory."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from dist_ft.checkpoint.lineage import committed
from dist_ft.config import Config, load_config
from dist_ft.errors import CheckpointError, ConfigError
from dist_ft.layout import GROWING
from dist_ft.metric_rows import EvalRow, StepRow
from dist_ft.report.checkpoints import Entry, list_checkpoints
from dist_ft.run.events import LedgerEntry, read_ledger
from dist_ft.run.exports import BEST, FINAL, LATEST
from dist_ft.run.log import read_evals, read_lines, read_steps
from dist_ft.run.place import Run
from dist_ft.run.run_inputs import SplitSummary, read_data_summary
from dist_ft.run.status import RunStatus, read_status


@dataclass(frozen=True)
class RunFiles:
    """What the files of a run say.

    Attributes:
        status: Its state.
        steps: The row of metrics.jsonl that counts, by step.
        evals: The row of eval.jsonl that counts, by step.
        ledger: Entries of ledger.jsonl in order.
        config: The resolved config; None if it cannot be read.
        config_text: The file's text.
        data: What each source of the data holds; empty for runs of earlier versions.
        checkpoints: Its checkpoints.
        export_names: `final`, `best`, `latest` → folder that it points at.
        versions: Version of each library at the newest checkpoint.
        answers: Sample answers of the newest export that was measured.
    """

    status: RunStatus
    steps: Mapping[int, StepRow] = field(default_factory=dict)
    evals: Mapping[int, EvalRow] = field(default_factory=dict)
    ledger: Sequence[LedgerEntry] = ()
    config: Config | None = None
    config_text: str = ""
    data: Sequence[SplitSummary] = ()
    checkpoints: Sequence[Entry] = ()
    export_names: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    answers: Sequence[Mapping[str, Any]] = ()


def read_run_files(run: Run) -> RunFiles:
    """Return what the files of a run say.

    Raises:
        UsageError: No run exists at that path, or its run.json cannot be read.
    """
    status = read_status(run)
    run.fetch(*GROWING, "config.yaml", "data.json")
    config_text = run.config.read_text(encoding="utf-8") if run.config.is_file() else ""
    pointed = {name.rpartition("/")[2]: run.pointed_at(name) for name in (FINAL, BEST, LATEST)}
    return RunFiles(
        status,
        read_steps(run.metrics),
        read_evals(run.evals),
        read_ledger(run.ledger),
        _read_config(run) if config_text else None,
        config_text,
        read_data_summary(run.data),
        list_checkpoints(run)[0],
        {name: folder for name, folder in pointed.items() if folder},
        _read_versions(run),
        _read_answers(run),
    )


def _read_config(run: Run) -> Config | None:
    try:
        return load_config(run.config)
    except ConfigError:  # of another version; its text is shown all the same
        return None


def _read_versions(run: Run) -> Mapping[str, str]:
    try:
        manifests = committed(run.store)
    except (FileNotFoundError, CheckpointError):  # deleted while it was listed, or damaged
        return {}
    return manifests[-1].environment.versions if manifests else {}


def _read_answers(run: Run) -> list[dict[str, Any]]:
    names = [name for name in run.store.names("samples") if PurePosixPath(name).suffix == ".jsonl"]
    if not names:
        return []
    if not run.is_remote:
        return [row for row in read_lines(run.path / names[-1]) if isinstance(row, dict)]
    lines = run.store.read(names[-1]).decode(errors="replace").splitlines()
    return [row for row in map(json.loads, lines) if isinstance(row, dict)]
