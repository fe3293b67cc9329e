"""Compares several runs, as text and as an HTML page: config differences, curves, results. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_ft.config.training_sections import plain_metric
from dist_ft.metric_rows import EvalRow, StepRow
from dist_ft.printable import format_duration, printable
from dist_ft.report.pages.figures import WIDE, Chart, Line, draw, smooth, thin
from dist_ft.report.pages.history import attempts_of
from dist_ft.report.pages.page import Html, contents, page, paragraph, section, side_by_side, table
from dist_ft.report.pages.run_files import RunFiles
from dist_ft.report.table import format_value, metric_name
from dist_ft.run.scores import LOWER_IS_BETTER

_MAX_POINTS = 400
_MAX_CELL = 60
_OWN_KEYS = ("run.name", "run.output_dir")
"""Keys that differ between any two runs and say nothing."""
_RECENT_STEPS = 50

Table = list[tuple[str, ...]]


def name_runs(addresses: Sequence[str], runs: Sequence[RunFiles]) -> list[str]:
    """Return a name for each run: its id, or the end of its address where two have one id."""
    ids = [run.status.record.run_id for run in runs]
    return [
        run_id if ids.count(run_id) == 1 else "/".join(Path(address).parts[-2:])
        for run_id, address in zip(ids, addresses, strict=True)
    ]


def config_differences(runs: Sequence[RunFiles]) -> Table:
    """Return the config keys whose values differ, each with the value of every run."""
    flat = [dict(_flatten(run.config.model_dump(mode="json"))) if run.config else {} for run in runs]
    keys = sorted({key for values in flat for key in values} - {*_OWN_KEYS})
    rows = [(key, *(_shown(values.get(key, "-")) for values in flat)) for key in keys]
    return [row for row in rows if len({*row[1:]}) > 1]


def results(runs: Sequence[RunFiles]) -> Table:
    """Return what became of each run, a fact a row."""
    facts: list[tuple[str, Callable[[RunFiles], str]]] = [
        ("state", lambda run: run.status.record.state),
        ("steps", lambda run: f"{run.status.record.step:,} of {run.status.record.max_steps:,}"),
        ("tokens trained on", lambda run: f"{sum(row.tokens for row in run.steps.values()):,}"),
        ("training loss, last", lambda run: format_value(_last_loss(run))),
        ("tokens a second", lambda run: _rate(run)),
        ("workers at the end", lambda run: str(run.status.record.world_size)),
        ("attempts", lambda run: str(len(attempts_of(run.ledger, run.steps)))),
        ("time at work", lambda run: format_duration(run.status.record.active_s)),
        ("goodput", lambda run: f"{run.status.record.goodput:.0%}"),
    ]
    rows = [(name, *(fact(run) for run in runs)) for name, fact in facts]
    metrics = sorted({name for run in runs for row in run.evals.values() for name in row.metrics})
    for metric in metrics:
        shown = metric_name(metric)
        rows.append((f"{shown}, last", *(format_value(_last_metric(run.evals, metric)) for run in runs)))
        if plain_metric(metric) in LOWER_IS_BETTER:
            rows.append((f"{shown}, best", *(_best_metric(run.evals, metric) for run in runs)))
    return rows


def render_text(names: Sequence[str], runs: Sequence[RunFiles]) -> str:
    """Return the comparison as text."""
    blocks = [("results", results(runs)), ("config", config_differences(runs))]
    return "\n\n".join(_text_table((title, *names), rows) for title, rows in blocks if rows)


def render_page(names: Sequence[str], runs: Sequence[RunFiles]) -> str:
    """Return the comparison as a page."""
    return page(f"Comparison of {len(runs)} runs", _parts(names, runs))


def _parts(names: Sequence[str], runs: Sequence[RunFiles]) -> Iterator[Html]:
    yield paragraph(", ".join(names))
    yield contents([("results", "Results"), ("curves", "Curves"), ("config", "Config")])
    yield section("results", "Results")
    yield table(("", *names), results(runs))
    yield section("curves", "Curves")
    yield draw(_chart("Held-out loss", names, [_held_out(run.evals) for run in runs], "points", WIDE))
    yield draw(_chart("Training loss, smoothed", names, [smooth(_loss(run.steps)) for run in runs], "line", WIDE))
    rates = [_curve(run.steps, lambda row: row.tokens_per_s or None) for run in runs]
    norms = [_curve(run.steps, lambda row: row.grad_norm) for run in runs]
    yield side_by_side(
        [
            draw(_chart("Tokens a second", names, rates, "line")),
            draw(_chart("Norm of the gradient", names, norms, "line")),
        ]
    )
    yield section("config", "Config")
    differences = config_differences(runs)
    yield table(("key", *names), differences) if differences else paragraph("The configs do not differ.")


def _chart(
    title: str, names: Sequence[str], curves: Sequence[Sequence[tuple[float, float]]], kind: str, size: Any = None
) -> Chart:
    lines = [Line(name, curve, kind, i) for i, (name, curve) in enumerate(zip(names, curves, strict=True))]
    chart = Chart(title, "step", title.split(",")[0].lower(), lines)
    return chart if size is None else Chart(title, "step", chart.y_label, lines, size=size)


def _loss(steps: Mapping[int, StepRow]) -> list[tuple[float, float]]:
    return _curve(steps, lambda row: row.loss)


def _curve(steps: Mapping[int, StepRow], value: Callable[[StepRow], float | None]) -> list[tuple[float, float]]:
    return thin([(float(step), y) for step, row in sorted(steps.items()) if (y := value(row)) is not None], _MAX_POINTS)


def _held_out(evals: Mapping[int, EvalRow]) -> list[tuple[float, float]]:
    return [(float(step), y) for step, row in sorted(evals.items()) if (y := row.eval_loss) is not None]


def _last_loss(run: RunFiles) -> float | None:
    return next((row.loss for _, row in sorted(run.steps.items(), reverse=True) if row.loss is not None), None)


def _rate(run: RunFiles) -> str:
    recent = [row.tokens_per_s for _, row in sorted(run.steps.items())[-_RECENT_STEPS:] if row.tokens_per_s]
    return f"{statistics.median(recent):,.0f}" if recent else "-"


def _last_metric(evals: Mapping[int, EvalRow], metric: str) -> float | None:
    return next(
        (v for _, row in sorted(evals.items(), reverse=True) if (v := row.metrics.get(metric)) is not None), None
    )


def _best_metric(evals: Mapping[int, EvalRow], metric: str) -> str:
    found = [(v, step) for step, row in evals.items() if (v := row.metrics.get(metric)) is not None]
    if not found:
        return "-"
    sign = 1 if LOWER_IS_BETTER[plain_metric(metric)] else -1
    value, step = min(found, key=lambda pair: (sign * pair[0], pair[1]))
    return f"{format_value(value)} at step {step}"


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _shown(value: Any) -> str:
    return printable(str(value), _MAX_CELL)


def _text_table(heads: Sequence[str], rows: Table) -> str:
    shown = [tuple(printable(cell, _MAX_CELL) for cell in row) for row in [tuple(heads), *rows]]
    widths = [max(len(row[column]) for row in shown) for column in range(len(heads))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in shown]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
