"""What stands in the files that W&B writes offline."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

_BLOCK_BYTES = 32768


def records_of(directory: Path, run_id: str) -> list[list[wandb_internal_pb2.Record]]:
    """The records of each W&B file of a run directory, oldest file first."""
    files = sorted(
        directory.glob(f"wandb/offline-run-*-{run_id}*/run-{run_id}.wandb"), key=lambda p: p.stat().st_mtime_ns
    )
    return [[_parse(data) for data in _read_log(file.read_bytes())] for file in files]


def _read_log(data: bytes) -> Iterator[bytes]:
    """Reads the LevelDB log format: blocks of 32 KiB with pieces of (checksum, length, type)."""
    at, record = 7, b""
    while at + 7 <= len(data):
        left = _BLOCK_BYTES - at % _BLOCK_BYTES
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        at += 7 + length
        record += data[at - length : at]
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def _parse(data: bytes) -> wandb_internal_pb2.Record:
    record = wandb_internal_pb2.Record()
    record.ParseFromString(data)
    return record


def history(records: list[wandb_internal_pb2.Record]) -> list[dict[str, Any]]:
    rows = [record.history.item for record in records if record.WhichOneof("record_type") == "history"]
    return [{".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items} for items in rows]


def history_of(directory: Path, run_id: str) -> tuple[list[dict[str, Any]], set[str], list[dict[str, Any]]]:
    """Returns the rows of all files, the ids of their runs, and their configs."""
    files = records_of(directory, run_id)
    runs = [record.run for records in files for record in records if record.WhichOneof("record_type") == "run"]
    configs = [{update.key: json.loads(update.value_json) for update in run.config.update} for run in runs]
    return [row for records in files for row in history(records)], {run.run_id for run in runs}, configs
