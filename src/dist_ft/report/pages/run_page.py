"""Makes the HTML page of a run from the files of its directory, during the run and afterwards.

`render_run_page` is pure; `run_files.py` reads the files.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from dist_ft.metric_rows import EvalRow, StepRow, held_out_sets
from dist_ft.printable import format_bytes, format_duration
from dist_ft.report.pages.figures import WIDE, Band, Chart, Line, Mark, draw, smooth, thin
from dist_ft.report.pages.history import AttemptSpan, attempts_of, bands_of, commits_of
from dist_ft.report.pages.page import (
    Cell,
    Html,
    alert,
    contents,
    labelled,
    page,
    paragraph,
    section,
    side_by_side,
    stacked,
    styled,
    table,
    tiles,
    verbatim,
)
from dist_ft.report.pages.run_files import RunFiles
from dist_ft.report.table import METRIC_NAMES, format_value, metric_name
from dist_ft.run.events import Committed, Event, Exported, GroupLoaded, LedgerEntry
from dist_ft.run.state import FINAL

_MAX_POINTS = 600
"""Most points of a line; if there are more steps, neighbours are drawn as their mean."""
_MAX_ROWS = 200
"""Most rows of a table; the last ones are kept."""
_MAX_ANSWERS = 12
_MAX_ANSWER = 600
_SMOOTHED_FROM = 20
"""Fewest steps whose loss is drawn twice: as it is, and smoothed."""
_RECENT_STEPS = 50
_ROUTINE: tuple[type[Event], ...] = (Committed, GroupLoaded, Exported)
"""Events that the table leaves out."""
_SEVERITIES = {"recovering": "warning", "giving_up": "error", "failed": "error", "rank_failed": "warning",
               "skip_batch": "warning", "save_failed": "warning", "checkpoint_damaged": "warning",
               "export_failed": "warning", "over_budget": "warning", "completed": "good"}  # fmt: skip

Row = TypeVar("Row", StepRow, EvalRow)
Point = tuple[float, float]
Section = tuple[str, str, list[Html]]


def render_run_page(files: RunFiles) -> str:
    """Return the page of a run."""
    found = [
        ("loss", "Loss", _loss(files)),
        ("training", "Training", _training(files)),
        ("results", "Results", _results(files)),
        ("answers", "Answers", _answers(files)),
        ("attempts", "Attempts and recoveries", _attempts(files)),
        ("checkpoints", "Checkpoints", _checkpoints(files)),
        ("exports", "Exports", _exports(files)),
        ("data", "Data", _data(files)),
        ("events", "Events", _events(files)),
        ("config", "Config", _config(files)),
        ("versions", "Versions", _versions(files)),
    ]
    return page(f"Run {files.status.record.run_id}", _parts(files, [part for part in found if part[2]]))


def _parts(files: RunFiles, sections: Sequence[Section]) -> Iterator[Html]:
    record = files.status.record
    yield paragraph(
        f"{record.state} at step {record.step:,} of {record.max_steps:,}, attempt {record.attempt}, "
        f"{record.world_size} workers; {record.goodput:.0%} of the time at work went into steps that count."
    )
    if record.error:
        yield alert(f"{record.error['type']}: {record.error['message']}")
    yield tiles(_facts(files))
    yield contents((name, title) for name, title, _ in sections)
    for name, title, parts in sections:
        yield section(name, title)
        yield from parts


def _facts(files: RunFiles) -> list[tuple[str, str, str]]:
    """Return what a reader wants to know first."""
    record, steps = files.status.record, files.steps
    rows = [steps[step] for step in sorted(steps)]
    losses = [row.loss for row in rows if row.loss is not None]
    held_out = {step: row.eval_loss for step, row in sorted(files.evals.items()) if row.eval_loss is not None}
    recent = [row for row in rows[-_RECENT_STEPS:] if row.step_s]
    share = f"{record.step / record.max_steps:.0%}" if record.max_steps else ""
    facts = [("progress", f"{record.step:,} / {record.max_steps:,}", f"{share} of the steps")]
    if record.state not in FINAL and recent:
        left = statistics.median(row.step_s for row in recent) * (record.max_steps - record.step)
        facts.append(("left", format_duration(left), "at the pace of the last steps"))
    if losses:
        facts.append(("training loss", f"{losses[-1]:.4f}", f"first {losses[0]:.4f}"))
    if held_out:
        best = min(held_out, key=lambda step: (held_out[step], step))
        facts.append(("held-out loss", f"{[*held_out.values()][-1]:.4f}", f"best {held_out[best]:.4f} at step {best}"))
    if recent:
        rate = statistics.median(row.tokens_per_s for row in recent)
        facts.append(("tokens a second", f"{rate:,.0f}", f"median of the last {len(recent)} steps"))
    spans = attempts_of(files.ledger, steps)
    num_failures = sum(span.is_failure for span in spans)
    failures = f"{num_failures} ended by a failure" if num_failures else "none ended by a failure"
    facts.append(("attempts", f"{len(spans)}", failures))
    facts.append(("time at work", format_duration(record.active_s), f"goodput {record.goodput:.0%}"))
    return facts


def _loss(files: RunFiles) -> list[Html]:
    measured = [(float(step), y) for step, row in sorted(files.evals.items()) if (y := row.eval_loss) is not None]
    training = _points(files.steps, lambda row: row.loss)
    lines = [Line("training", training)]
    if len(training) >= _SMOOTHED_FROM:
        lines = [Line("training", training, "faint"), Line("training, smoothed", smooth(training))]
    lines.append(Line("held-out", thin(measured, _MAX_POINTS), "points", 1))
    for number, metric in enumerate(held_out_sets(files.evals.values()), 2):
        of_set = [
            (float(at), y) for at, row in sorted(files.evals.items()) if (y := row.metrics.get(metric)) is not None
        ]
        lines.append(Line(f"held-out: {metric.partition('/')[0]}", thin(of_set, _MAX_POINTS), "points", number))
    bands = [Band(f"attempt {number}", start - 1, end) for number, start, end in bands_of(files.steps)]
    chart = Chart("Loss a trained token", "step", "loss", lines, bands if len(bands) > 1 else (), size=WIDE)
    drawn = draw(chart)
    return [drawn] if drawn.text else []


def _training(files: RunFiles) -> list[Html]:
    steps = files.steps

    def chart(title: str, y_label: str, value: Callable[[StepRow], float | None], number: int, **how: Any) -> Chart:
        return Chart(title, "step", y_label, [Line("", _points(steps, value), colour=number)], **how)

    charts = [
        chart("Tokens a second", "tokens/s", lambda row: row.tokens_per_s or None, 0, is_from_zero=True),
        chart("Norm of the gradient", "norm", lambda row: row.grad_norm, 3, is_from_zero=True),
        chart("Learning rate", "rate", lambda row: row.lr, 2, is_from_zero=True),
        chart("Seconds a step", "s", lambda row: row.step_s or None, 4, is_from_zero=True),
        chart("Waiting for data", "share of the step", lambda row: row.data_s / row.step_s if row.step_s else None, 5,
              is_from_zero=True, is_share=True),
        chart("Goodput", "share of the time", lambda row: row.goodput, 1, is_from_zero=True, is_share=True),
    ]  # fmt: skip
    names = sorted({name for row in steps.values() for name in row.metrics})
    charts += [chart(name, name, lambda row, name=name: row.metrics.get(name), 0) for name in names[:8]]  # type: ignore[misc]
    drawn = [figure for figure in map(draw, charts) if figure.text]
    return [side_by_side(drawn)] if drawn else []


def _results(files: RunFiles) -> list[Html]:
    parts = []
    comparison = files.status.record.result.get("comparison") or {}
    names = sorted({metric for values in comparison.values() for metric in values}, key=_metric_order)
    if len(comparison) > 1 and names:
        rows = [
            (metric_name(name), *(format_value(values.get(name)) for values in comparison.values())) for name in names
        ]
        parts.append(table(("metric", *comparison), rows))
    measured = [row for _, row in sorted(files.evals.items()) if any(v is not None for v in row.metrics.values())]
    columns = sorted({name for row in measured for name in row.metrics}, key=_metric_order)
    others = [name for name in columns if name not in ("eval_loss", "perplexity")]
    charts = [
        Chart(f"Held-out: {metric_name(name)}", "step", metric_name(name),
              [Line("", [(row.step, v) for row in measured if (v := row.metrics.get(name)) is not None], "points", i)])
        for i, name in enumerate(others[:8])
    ]  # fmt: skip
    drawn = [draw(chart) for chart in charts if len(chart.lines[0].points) > 2]
    if drawn:
        parts.append(side_by_side(drawn))
    if measured:
        heads = ("step", *(metric_name(name) for name in columns))
        parts.append(
            table(heads, _last([(r.step, *(format_value(r.metrics.get(n)) for n in columns)) for r in measured]))
        )
    return parts


def _metric_order(name: str) -> tuple[int, str]:
    known = [*METRIC_NAMES]
    return (known.index(name) if name in known else len(known), name)


def _answers(files: RunFiles) -> list[Html]:
    if not files.answers:
        return []
    models = [name for name in files.answers[0] if name not in ("prompt", "reference")]
    shown = [
        tuple(_text(row.get(name)) for name in ("prompt", "reference", *models)) for row in files.answers[:_MAX_ANSWERS]
    ]
    more = len(files.answers) - len(shown)
    parts = [table(("prompt", "reference", *models), shown)]
    return [*parts, paragraph(f"{more:,} more in samples/.")] if more > 0 else parts


def _text(value: object) -> Html:
    """Return an answer with its lines; a list of turns as one text."""
    if isinstance(value, list):
        value = "\n".join(str(turn.get("content", turn)) if isinstance(turn, dict) else str(turn) for turn in value)
    lines = str(value if value is not None else "-")[:_MAX_ANSWER].split("\n")
    return stacked(*lines)


def _attempts(files: RunFiles) -> list[Html]:
    spans = attempts_of(files.ledger, files.steps)
    if not spans:
        return []
    began = spans[0].began
    unit, seconds = _time_unit(files.ledger[-1].time - began)

    def at(time: float) -> float:
        return (time - began) / seconds

    failures = [Mark(at(span.ended), is_bad=True) for span in spans if span.is_failure]
    workers = [
        point for span in spans for point in ((at(span.began), span.world_size), (at(span.ended), span.world_size))
    ]
    progress = [(at(span.loaded or span.began), float(span.start_step)) for span in spans]
    progress = sorted([*progress, *((at(time), float(step)) for time, step in commits_of(files.ledger))])
    charts = [
        Chart("Workers over time", unit, "workers", [Line("", workers, "steps")], marks=failures, is_from_zero=True),
        Chart("Checkpoints over time", unit, "step", [Line("", thin(progress, _MAX_POINTS), "points", 2)],
              marks=failures, is_from_zero=True),
    ]  # fmt: skip
    parts = [side_by_side([draw(chart) for chart in charts])]
    if failures:
        recovered = [span.recovery_s for span in spans if span.recovery_s is not None]
        middle = (
            f" Half of the recoveries took at most {format_duration(statistics.median(recovered))}."
            if recovered
            else ""
        )
        parts.append(
            paragraph(f"Dashed lines are failures: {len(failures)} of {len(spans)} attempts ended by one.{middle}")
        )
    heads = ("attempt", "began (UTC)", "workers", "steps", "lasted", "recovery", "ended by")
    parts.append(table(heads, _last([_attempt_row(span) for span in spans])))
    return parts


def _attempt_row(span: AttemptSpan) -> Sequence[Cell]:
    steps = f"{span.start_step:,} → {span.end_step:,}"
    recovery = "" if span.recovery_s is None else f"{span.recovery_s:.1f} s"
    lasted = format_duration(span.ended - span.began)
    return (
        str(span.number), _when(span.began), str(span.world_size), styled(steps, "nowrap"), lasted, recovery,
        styled(span.ending, "warning" if span.is_failure else "soft"),
    )  # fmt: skip


def _time_unit(seconds: float) -> tuple[str, float]:
    return ("hours", 3600.0) if seconds > 3 * 3600 else ("minutes", 60.0) if seconds > 180 else ("seconds", 1.0)


def _checkpoints(files: RunFiles) -> list[Html]:
    rows = [
        (
            entry.step, str(entry.attempt), str(entry.world_size), str(entry.zero_stage), format_bytes(entry.num_bytes),
            ", ".join(entry.tags) + ("" if entry.counts else "superseded"), _folder(entry.path),
        )
        for entry in files.checkpoints
    ]  # fmt: skip
    if not rows:
        return []
    total = format_bytes(sum(entry.num_bytes for entry in files.checkpoints))
    num_commits = len(commits_of(files.ledger))
    heads = ("step", "attempt", "workers", "ZeRO", "size", "tags", "folder")
    return [paragraph(f"{num_commits:,} committed, {len(rows)} kept: {total}."), table(heads, _last(rows))]


def _exports(files: RunFiles) -> list[Html]:
    named: dict[str, list[str]] = {}
    for name, folder in files.export_names.items():
        named.setdefault(Path(folder).name, []).append(f"exports/{name}")
    rows = [(_folder(path), ", ".join(named.get(Path(path).name, []))) for path in files.status.exports]
    return [table(("folder", "names that point at it"), rows)] if rows else []


def _data(files: RunFiles) -> list[Html]:
    if not files.data:
        return []
    parts, rows = [], []
    for split in files.data:
        counts = split.counts
        if counts is None:
            rows.append((split.source, f"{split.num_shards:,} shards made on the way", "", "", "", ""))
            continue
        share = f"{counts.num_trained_tokens / counts.num_tokens:.0%}" if counts.num_tokens else ""
        rows.append(
            (split.source, f"{counts.num_rows:,}", f"{counts.num_sequences:,}", f"{counts.num_tokens:,}",
             f"{counts.num_trained_tokens:,}", share)
        )  # fmt: skip
    parts.append(table(("source", "rows", "sequences", "tokens", "trained tokens", "trained"), rows))
    omitted = []
    for split in files.data:
        counts = split.counts
        reasons = {f"curation: {rule}": number for rule, number in split.removed_rows.items()}
        if counts is not None:
            reasons |= {
                "cannot be used": counts.num_bad_rows, "no trained token": counts.num_untrained_rows,
                "longer than data.seq_len": counts.num_long_samples,
            }  # fmt: skip
        omitted += [(split.source, reason, number) for reason, number in reasons.items() if number]
    if omitted:
        parts.append(table(("source", "rows treated apart", "rows"), omitted))
    seen = sum(row.tokens for row in files.steps.values())
    trained = sum(row.trained_tokens for row in files.steps.values())
    parts.append(paragraph(f"Trained so far: {seen:,} tokens, {trained:,} of them with a loss."))
    return parts


def _events(files: RunFiles) -> list[Html]:
    news = [_event_row(entry) for entry in files.ledger if not isinstance(entry.event, _ROUTINE)]
    return [table(("", "when (UTC)", "attempt", "step", "what"), _last(news))] if news else []


def _config(files: RunFiles) -> list[Html]:
    return [verbatim(files.config_text)] if files.config_text else []


def _versions(files: RunFiles) -> list[Html]:
    return [table(("library", "version"), sorted(files.versions.items()))] if files.versions else []


def _points(rows: Mapping[int, Row], value: Callable[[Row], float | None]) -> list[Point]:
    """Return a value over the steps; if there are too many steps, neighbours become their mean."""
    found = [(step, value(row)) for step, row in sorted(rows.items())]
    return thin([(float(step), float(y)) for step, y in found if y is not None and abs(y) < float("inf")], _MAX_POINTS)


def _event_row(entry: LedgerEntry) -> Sequence[Cell]:
    facts = entry.event.facts()
    step = facts.get("step", facts.get("start_step"))
    severity = labelled(_SEVERITIES[entry.name]) if entry.name in _SEVERITIES else ""
    attempt = "" if entry.attempt is None else str(entry.attempt)
    shown = []
    for key, value in facts.items():
        if isinstance(value, dict) and "message" in value:  # the wire form of an error
            value = f"{value.get('type', 'error')}: {value['message']}"
        if key not in ("step", "start_step"):
            shown.append(f"{key} {value}")
    what = ", ".join([entry.name, *shown])
    return severity, _when(entry.time), attempt, "" if step is None else str(step), what


def _when(time: float) -> Html:
    return styled(datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M:%S"), "nowrap")


def _folder(path: str) -> str:
    return "/".join(Path(path).parts[-2:])


def _last(rows: Sequence[Sequence[Cell]]) -> Sequence[Sequence[Cell]]:
    return rows[-_MAX_ROWS:]
