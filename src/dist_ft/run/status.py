"""Reads the state of a run from its directory, and asks the run to stop through a file there.

Owns what `dist-ft status`, `stop` and `export` know about a run. It talks to no process, so it works on any machine
that sees the directory, during the run and afterwards.
"""

from __future__ import annotations

import getpass
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dist_ft.checkpoint.lineage import committed
from dist_ft.checkpoint.manifest import MANIFEST, Manifest
from dist_ft.config import Config, load_config
from dist_ft.errors import ConfigError, DistFtError, UsageError
from dist_ft.printable import printable
from dist_ft.run.place import Run, open_run
from dist_ft.run.state import FINAL, RunRecord
from dist_ft.storage.publish import read_json

_POLL_S = 0.2
_BAR = 30
_MESSAGE = 2000  # most characters of an error that are shown; an error can quote data


@dataclass(frozen=True)
class SavedCheckpoint:
    """A committed checkpoint: its step, and its directory as a path or URL."""

    step: int
    path: str


@dataclass(frozen=True)
class RunStatus:
    """Holds what the files of a run say.

    Attributes:
        record: Contents of run.json.
        checkpoints: Committed checkpoints, by step.
        exports: Paths or URLs of finished exports.
    """

    record: RunRecord
    checkpoints: tuple[SavedCheckpoint, ...]
    exports: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return what `dist-ft status --json` prints, with `error` and `result` if the run has them."""
        record = self.record.to_dict()
        ended = {key: record.pop(key) for key in ("error", "result")}
        for hidden in ("active_s", "useful_s"):
            del record[hidden]
        return {
            **record,
            "checkpoints": [asdict(checkpoint) for checkpoint in self.checkpoints],
            "exports": list(self.exports),
            "wandb_id": self.record.sink_ids.get("wandb"),
            **{key: value for key, value in ended.items() if value},
        }


def read_status(run: Run) -> RunStatus:
    """Read the status of a run; all paths in it are absolute.

    Raises:
        UsageError: No run exists at that path, or its run.json cannot be read.
    """
    record = read_record(run)
    checkpoints = (SavedCheckpoint(found.step, run.address_of(found.directory)) for found in _committed(run))
    # `folders` leaves out the links that point at an export. A hidden folder is still being written.
    exports = [name for name in run.store.folders("exports") if not name.rpartition("/")[2].startswith(".")]
    return RunStatus(record, tuple(checkpoints), tuple(run.address_of(name) for name in exports))


def read_if_seen(address: str | None) -> RunStatus | None:
    """Return the status of a run directory (path or URL); None if this machine does not see it (yet)."""
    if address is None:
        return None
    try:
        run = open_run(address)
        return read_status(run) if run.has("run.json") else None
    except (OSError, ConfigError):  # this machine cannot reach the bucket
        return None


def render_status(status: RunStatus) -> str:
    """Return the status as a few lines of text."""
    record = status.record
    step, max_steps, result = record.step, record.max_steps, record.result
    filled = round(_BAR * min(1.0, step / max_steps)) if max_steps else 0
    lines = [
        f"{record.run_id}: {record.state}, attempt {record.attempt}, {record.world_size} workers",
        f"  steps        {step:,} of {max_steps:,}  [{'#' * filled}{'.' * (_BAR - filled)}]",
    ]
    early = result.get("early_stop")
    if early:
        lines.append(f"  early stop   patience {early['patience']} for {early['metric']}")
    if record.error:
        lines.append(f"  error        {record.error['type']}: {printable(record.error['message'], _MESSAGE)}")
    losses = [f"{name} {result[key]:.4f}" for key, name in _LOSSES if result.get(key) is not None]
    tuned = (result.get("comparison") or {}).get("tuned", {})
    losses += [
        f"{name.removesuffix('/eval_loss')} {value:.4f}"
        for name, value in tuned.items()
        if name.endswith("/eval_loss") and value is not None
    ]
    if losses:
        lines.append(f"  loss         {', '.join(losses)}")
    if step:
        lines.append(f"  goodput      {record.goodput:.0%} of the time at work went into steps that count")
    lines += _section("workers", [f"rank {w.rank}  pid {w.pid}  on {w.node_ip}" for w in record.workers])
    lines += _section("checkpoints", [_below_run(checkpoint.path) for checkpoint in status.checkpoints])
    lines += _section("exports", [_below_run(path) for path in status.exports])
    lines += [f"  {_SINK_NAMES.get(name, name):<12} {sink_id}" for name, sink_id in record.sink_ids.items()]
    return "\n".join(lines)


def request_stop(run: Run, timeout_s: float) -> str:
    """Asks a run to checkpoint and stop; returns a line that says how it ended.

    Args:
        run: The run.
        timeout_s: Seconds to wait. After a timeout, the request stays in the run directory.

    Raises:
        UsageError: There is no run, or it has ended already.
        DistFtError: It did not end in time, or it failed.
    """
    record = read_record(run)
    if record.state in FINAL:
        raise UsageError(f"run {run} is not running: it {_ended(record)}; there is nothing to stop")
    run.ask_to_stop({"time": time.time(), "pid": os.getpid(), "user": _user()})
    deadline = time.monotonic() + timeout_s
    while (record := read_record(run)).state not in FINAL:
        if time.monotonic() >= deadline:
            raise DistFtError(_no_answer(run, record, timeout_s))
        time.sleep(min(max(_POLL_S, run.look_every_s), max(0.0, deadline - time.monotonic())))
    run.forget_stop()  # a run that ended by itself has not read the request
    if record.state == "failed":
        raise DistFtError(f"run {run} {_ended(record)}")
    manifests = _committed(run)
    return f"{_ended(record)}, {f'checkpoint {manifests[-1].directory}' if manifests else 'no checkpoint'}"


def find_checkpoint(run: Run, step: int | None) -> tuple[Config, str]:
    """Return the config of a run and the path of a checkpoint's manifest, relative to the run directory.

    Args:
        run: The run.
        step: Step of a committed checkpoint; None means the last one.

    Raises:
        UsageError: There is no run at that path, or no such checkpoint.
        ConfigError: The run's config.yaml cannot be read.
    """
    read_record(run)
    manifests = {manifest.step: manifest for manifest in _committed(run)}
    if not manifests:
        raise UsageError(f"run {run} has no committed checkpoint; let it reach its first one")
    if step is not None and step not in manifests:
        known = ", ".join(map(str, manifests))
        raise UsageError(f"run {run} has no checkpoint at step {step}; choose one of: {known}")
    manifest = manifests[max(manifests) if step is None else step]
    run.fetch("config.yaml")
    return load_config(run.config), f"{manifest.directory}/{MANIFEST}"


_SINK_NAMES = {"wandb": "W&B", "mlflow": "MLflow"}
_LOSSES = (("final_loss", "training"), ("eval_loss", "held-out"))


def read_record(run: Run) -> RunRecord:
    """Return the contents of run.json of a run directory.

    Raises:
        UsageError: The path is not a run directory, or its run.json cannot be read.
    """
    run.fetch("run.json")
    name = run.address_of("run.json")
    if not run.path.is_dir():
        raise UsageError(f"{run} is not a directory; pass a run directory, <run.output_dir>/<run.name>")
    if not run.run_json.is_file():
        raise UsageError(f"{run} is not a run directory (no run.json); pass <run.output_dir>/<run.name>")
    try:
        data = read_json(run.run_json)
    except (OSError, ValueError) as error:
        raise UsageError(f"{name} cannot be read: {error}") from error
    try:
        return RunRecord.from_dict(data)
    except (ValueError, TypeError) as error:
        raise UsageError(f"{name} is not a run's record: {error}") from error


def _committed(run: Run) -> list[Manifest]:
    try:
        return committed(run.store)
    except FileNotFoundError:  # the run deleted an old checkpoint while we listed it
        return committed(run.store)


def _ended(record: RunRecord) -> str:
    text = f"{record.state} at step {record.step}"
    return f"{text}: {printable(record.error['message'], _MESSAGE)}" if record.error else text


def _no_answer(run: Run, record: RunRecord, timeout_s: float) -> str:
    return (
        f"run {run} did not answer within {timeout_s:g} s: state {record.state}, step {record.step}. The "
        f"request stays in {run.stop_request.name} and is followed once the run reads it. If its driver is dead, "
        "run.json keeps this state for ever; `dist-ft train CONFIG --resume` continues after the last checkpoint"
    )


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # in a container, the user may have no name
        return str(os.getuid())


def _section(title: str, lines: list[str]) -> list[str]:
    return [f"  {title if index == 0 else '':<12} {line}" for index, line in enumerate(lines)]


def _below_run(path: str) -> str:
    return "/".join(Path(path).parts[-2:])
