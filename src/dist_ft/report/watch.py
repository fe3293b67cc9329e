"""Makes a live view of a run from its files alone."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from dist_ft.coordinator.story import format_ranks, story_lines
from dist_ft.metric_rows import StepRow, held_out_sets
from dist_ft.printable import format_duration, printable
from dist_ft.run.events import read_ledger
from dist_ft.run.log import read_evals
from dist_ft.run.place import Run
from dist_ft.run.state import FINAL, RunRecord
from dist_ft.run.status import read_status, render_status

_TAIL_BYTES = 4096
_SPARK_BYTES = 64 * 1024
_SPARKS = "▁▂▃▄▅▆▇█"
_SPARK_WIDTH = 48
_STORY_LINES = 8
_MAX_WORKERS = 16
_BAR = 40


def view(run: Run) -> tuple[str, bool]:
    """Return the run's status with its newest numbers, and whether it has ended.

    Raises:
        UsageError: No run exists at that path.
    """
    status = read_status(run)
    run.fetch("metrics.jsonl")
    row = newest_row(run.metrics)
    text = render_status(status)
    if row is not None:
        loss = "left out" if row.loss is None else f"{row.loss:.4f}"
        text += f"\n  newest step  {row.step:,}  loss {loss}  lr {row.lr:.2e}  {row.tokens_per_s:,.0f} tokens/s"
    return text, status.record.state in FINAL


def live_view(run: Run) -> tuple[RenderableType, bool]:
    """Return the run as a view of a terminal, and whether it has ended.

    Raises:
        UsageError: No run exists at that path.
    """
    status = read_status(run)
    run.fetch("metrics.jsonl", "eval.jsonl", "ledger.jsonl")
    rows = newest_rows(run.metrics, _SPARK_BYTES)
    evals = [row for _, row in sorted(read_evals(run.evals).items())]
    lines = story_lines(read_ledger(run.ledger)[-2 * _STORY_LINES :])[-_STORY_LINES:]
    record = status.record
    numbers = Table.grid(padding=(0, 2))
    for name, values, spec in (
        ("loss", [row.loss for row in rows], ".4f"),
        ("held-out", [row.eval_loss for row in evals], ".4f"),
        *(
            (name.removesuffix("/eval_loss"), [row.metrics.get(name) for row in evals], ".4f")
            for name in held_out_sets(evals)
        ),
        ("tokens/s", [row.tokens_per_s or None for row in rows], ",.0f"),
        ("grad norm", [row.grad_norm for row in rows], ".3f"),
    ):
        known = [value for value in values if value is not None]
        if known:
            numbers.add_row(Text(name, "dim"), Text(sparkline(known), "cyan"), Text(format(known[-1], spec), "bold"))
    parts: list[RenderableType] = [_progress(record, rows), Text(), numbers, Text()]
    if record.error:
        parts.append(Text(f"{record.error['type']}: {printable(record.error['message'], 500)}", "red"))
    nodes: dict[str, list[int]] = {}
    for worker in record.workers:
        nodes.setdefault(worker.node_ip, []).append(worker.rank)
    workers = [f"{node}: rank {format_ranks(sorted(ranks))}" for node, ranks in sorted(nodes.items())]
    more = [f"and {len(workers) - _MAX_WORKERS} nodes more"] if len(workers) > _MAX_WORKERS else []
    parts += [Text(line, "dim") for line in [*workers[:_MAX_WORKERS], *more]]
    parts += [Text(), *(Text(line, overflow="ellipsis", no_wrap=True) for line in lines)]
    title = Text(f" {printable(record.run_id, 60)} ", "bold")
    return Panel(Group(*parts), title=title, title_align="left", border_style="dim"), record.state in FINAL


def _progress(record: RunRecord, rows: Sequence[StepRow]) -> Text:
    share = min(1.0, record.step / record.max_steps) if record.max_steps else 0.0
    done = round(_BAR * share)
    text = Text.assemble(("━" * done, "green"), ("╌" * (_BAR - done), "dim"))
    text.append(f"  step {record.step:,} of {record.max_steps:,}")
    pace = [row.step_s for row in rows[-20:] if row.step_s]
    if pace and record.state not in FINAL:
        text.append(f"  ETA {format_duration(statistics.median(pace) * (record.max_steps - record.step))}", "bold")
    text.append("\n")
    text.append(record.state, "bold red" if record.state == "failed" else "bold")
    return text.append(f", attempt {record.attempt}, {record.world_size} workers, goodput {record.goodput:.0%}")


def sparkline(values: Sequence[float], width: int = _SPARK_WIDTH) -> str:
    """Return numbers as a line of blocks; neighbours become their mean where there are too many."""
    finite = [value for value in values if math.isfinite(value)]
    size = max(1, math.ceil(len(finite) / width))
    means = [statistics.fmean(finite[start : start + size]) for start in range(0, len(finite), size)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    scale = (len(_SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_SPARKS[round((value - low) * scale)] for value in means)


def newest_row(path: Path) -> StepRow | None:
    """Return the last complete row of metrics.jsonl, reading only its end; None if there is none."""
    return next(reversed(newest_rows(path)), None)


def newest_rows(path: Path, num_bytes: int = _TAIL_BYTES) -> list[StepRow]:
    """Return the rows that lie whole in the last bytes of metrics.jsonl; none where it cannot be read."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        start = max(0, file.seek(0, os.SEEK_END) - num_bytes)
        file.seek(start)
        *whole, _ = file.read().split(b"\n")  # after the last line break: nothing, or an incomplete row
    try:
        return [StepRow.from_dict(json.loads(line)) for line in (whole[1:] if start else whole)]
    except ValueError:
        return []
