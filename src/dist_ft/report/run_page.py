"""Makes the HTML page of a run from the files of its directory, during the run and afterwards.

`render_run_page` is pure; `read_run_page` reads the files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import TypeVar

from dist_ft.layout import GROWING
from dist_ft.metric_rows import EvalRow, StepRow
from dist_ft.report.page import Cell, Html, heading, labelled, line_chart, page, paragraph, table
from dist_ft.run.events import AttemptBegan, Committed, Event, GroupLoaded, LedgerEntry, read_ledger
from dist_ft.run.log import read_evals, read_steps
from dist_ft.run.place import Run
from dist_ft.run.status import RunStatus, read_status

_MAX_POINTS = 600
"""Most points of a line; if there are more steps, neighbours are drawn as their mean."""
_MAX_ROWS = 200
"""Most rows of a table; the last ones are kept."""
_ROUTINE: tuple[type[Event], ...] = (Committed, GroupLoaded)
"""Events that the table leaves out."""
_SEVERITIES = {"recovering": "warning", "giving_up": "error", "failed": "error", "rank_failed": "warning",
               "skip_batch": "warning", "save_failed": "warning", "checkpoint_damaged": "warning"}  # fmt: skip

Row = TypeVar("Row", StepRow, EvalRow)
Steps = Mapping[int, StepRow]
Evals = Mapping[int, EvalRow]
Entries = Sequence[LedgerEntry]
Point = tuple[float, float]


def read_run_page(run: Run) -> str:
    """Return the page of a run.

    Raises:
        UsageError: No run exists at that path, or its run.json cannot be read.
    """
    status = read_status(run)
    run.fetch(*GROWING)
    return render_run_page(status, read_steps(run.metrics), read_evals(run.evals), read_ledger(run.ledger))


def render_run_page(status: RunStatus, steps: Steps, evals: Evals, ledger: Entries) -> str:
    """Return the page.

    Args:
        status: Status from `read_status`.
        steps: The valid row of metrics.jsonl for each step.
        evals: The valid row of eval.jsonl for each step.
        ledger: Entries of ledger.jsonl in order.
    """
    return page(f"Run {status.record.run_id}", _parts(status, steps, evals, ledger))


def _parts(status: RunStatus, steps: Steps, evals: Evals, ledger: Entries) -> Iterator[Html]:
    record = status.record
    yield paragraph(
        f"{record.state} at step {record.step:,} of {record.max_steps:,}, attempt {record.attempt}, "
        f"{record.world_size} workers; {record.goodput:.0%} of the time at work went into steps that count."
    )
    if record.error:
        yield paragraph(f"{record.error['type']}: {record.error['message']}")
    losses = [
        ("training", _points(steps, lambda row: row.loss)),
        ("held-out", _points(evals, lambda row: row.eval_loss)),
    ]
    yield from _chart("Loss a trained token", losses, is_from_zero=False)
    yield from _chart("Tokens a second", [("tokens", _points(steps, lambda row: row.tokens_per_s))])
    waiting = _points(steps, lambda row: row.data_s / row.step_s if row.step_s else None)
    yield from _chart("Share of a step spent waiting for data", [("share", waiting)])
    yield from _chart(
        "Goodput: share of the time in steps that count", [("goodput", _points(steps, lambda row: row.goodput))]
    )
    yield from _chart("Workers over time, in minutes", [("workers", _world_sizes(ledger))])
    # A row may hold other metrics alone, or a loss that was not finite.
    measured = [(step, row.eval_loss) for step, row in sorted(evals.items()) if row.eval_loss is not None]
    if measured:
        yield heading("Evaluations")
        yield table(("step", "held-out loss"), _last(measured))
    news = [_event_row(entry) for entry in ledger if not isinstance(entry.event, _ROUTINE)]
    yield heading("Attempts and what ended them")
    yield table(("", "when (UTC)", "attempt", "step", "what"), _last(news))
    yield heading("Checkpoints")
    yield table(("step", "directory"), _last([(saved.step, saved.path) for saved in status.checkpoints]))
    if status.exports:
        yield heading("Exports")
        yield table(("directory",), [(path,) for path in status.exports])


def _chart(title: str, lines: Sequence[tuple[str, Sequence[Point]]], is_from_zero: bool = True) -> Iterator[Html]:
    shown = [(name, points) for name, points in lines if points]
    if shown:
        yield heading(title)
        yield line_chart(title, shown, is_from_zero)


def _points(rows: Mapping[int, Row], value: Callable[[Row], float | None]) -> list[Point]:
    """Return a value over the steps; if there are too many steps, neighbours become their mean."""
    found = [(step, value(row)) for step, row in sorted(rows.items())]
    points = [(float(step), float(y)) for step, y in found if y is not None]
    size = -(-len(points) // _MAX_POINTS)
    groups = (points[start : start + size] for start in range(0, len(points), max(1, size)))
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def _world_sizes(ledger: Entries) -> list[Point]:
    """Return the world size over the steps as a staircase: each attempt's size until the next attempt begins."""
    attempts = [(entry.time, entry.event.world_size) for entry in ledger if isinstance(entry.event, AttemptBegan)]
    if not attempts:
        return []
    began, points = attempts[0][0], []
    ends = [*(start for start, _ in attempts[1:]), ledger[-1].time]
    for (start, size), end in zip(attempts, ends, strict=True):
        points += [((time - began) / 60, float(size)) for time in (start, end)]
    return points


def _event_row(entry: LedgerEntry) -> Sequence[Cell]:
    facts = entry.event.facts()
    step = facts.get("step", facts.get("start_step"))
    when = datetime.fromtimestamp(entry.time, UTC).strftime("%Y-%m-%d %H:%M:%S")
    severity = labelled(_SEVERITIES[entry.name]) if entry.name in _SEVERITIES else ""
    attempt = "" if entry.attempt is None else str(entry.attempt)
    shown = []
    for key, value in facts.items():
        if isinstance(value, dict) and "message" in value:  # the wire form of an error
            value = f"{value.get('type', 'error')}: {value['message']}"
        if key not in ("step", "start_step"):
            shown.append(f"{key} {value}")
    return severity, when, attempt, "" if step is None else str(step), ", ".join([entry.name, *shown])


def _last(rows: Sequence[Sequence[Cell]]) -> Sequence[Sequence[Cell]]:
    return rows[-_MAX_ROWS:]
