"""Renders the report of `dist-ft data check` as an HTML page. Numbers and texts come from `jobs/data_report/`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dist_ft.jobs.data_report.summary import DataReport
from dist_ft.report.data_text import describe_cost, verdict
from dist_ft.report.pages.page import (
    Cell,
    Html,
    bar_chart,
    heading,
    labelled,
    lines,
    page,
    paragraph,
    stacked,
    table,
)

_SOURCES = (
    "",
    "source",
    "rows",
    "sequences",
    "tokens",
    "trained %",
    "filled %",
    "median length",
    "p95",
    "longest",
)


def render_check_page(report: DataReport) -> str:
    """Return the report as one HTML file."""
    return page(f"Data of {report.run}", _parts(report))


def _parts(report: DataReport) -> Iterator[Html]:
    packing = "packed" if report.packing else "not packed"
    yield paragraph(f"data.seq_len={report.seq_len}, {packing}. {verdict(report.findings)}.")
    if report.cost:
        yield paragraph(f"A run on it: {describe_cost(report.cost)}.")
    yield heading("Findings")
    findings = []
    for finding in report.findings:
        rest = [f"… and {finding.num_more:,} more"] if finding.num_more else []
        places = [lines([*finding.places, *rest])] if finding.places else []
        findings.append((labelled(finding.severity), finding.split, stacked(finding.message, *places)))
    yield table(("", "where", "what"), findings) if findings else paragraph("None.")
    splits = report.splits
    yield heading("Sources")
    rows: list[Sequence[Cell]] = []
    for split in splits:
        lengths, filled = split.lengths, round(100 * split.packing_efficiency, 1)
        rows.append((
            split.name, split.source, split.rows, split.sequences, split.tokens, round(100 * split.trained_share, 1),
            filled, lengths.median, lengths.p95, lengths.max,
        ))  # fmt: skip
    yield table(_SOURCES, rows)
    yield bar_chart("Tokens by source", [(split.name, split.tokens) for split in splits], "tokens")
    yield heading("Share of tokens that are trained")
    yield bar_chart("Trained share", [(split.name, 100 * split.trained_share) for split in splits], "%")
    for split in splits:
        if not split.samples:
            continue
        width = split.histogram.width
        bars = [(f"{index * width:,}", count) for index, count in enumerate(split.histogram.counts)]
        yield heading(f"{split.name}: tokens of a sample, before the cut")
        yield bar_chart(f"Lengths of samples of {split.name}, from so many tokens on", bars, "samples")
        yield heading(f"{split.name}: turns of a row (0 is plain text)")
        turns = sorted((int(turns), count) for turns, count in split.turns.items())
        yield bar_chart(f"Turns of rows of {split.name}", [(str(name), count) for name, count in turns[:60]], "rows")
