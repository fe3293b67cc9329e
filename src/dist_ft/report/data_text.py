"""Renders `dist-ft data check`, `show` and `prepare` as text. All text of the data is made printable."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from operator import attrgetter

from dist_ft.jobs.data_report.summary import (
    SEVERITIES,
    DataReport,
    Finding,
    Segment,
    ShownData,
    ShownSequence,
    SplitSummary,
)
from dist_ft.jobs.plan.planned import Cost
from dist_ft.jobs.spec import Preparation
from dist_ft.printable import format_count, printable

_WIDTH = 110
_PLACE = 240
"""Most characters of a location with its problem."""
_HEAD, _TAIL = 3000, 1000
"""Characters shown at the start and at the end of a long segment."""
_MAX_TURNS = 6
_BREAK = "↵"
_COLORS = {(False, False): "", (False, True): "\x1b[36m", (True, False): "\x1b[32m", (True, True): "\x1b[1;32m"}
"""Colors by (is trained, is special)."""
_SEVERITY_COLORS = {"error": "\x1b[1;31m", "warning": "\x1b[33m", "note": "\x1b[2m"}
_DIM, _END = "\x1b[2m", "\x1b[0m"
_MARKS = ("⟦", "⟧")
"""Marks around trained text if there is no colour: in files, pipes and copied text."""


def render_check(report: DataReport, is_colored: bool) -> str:
    """Return the report of `data check` as a page."""
    packing = "packed" if report.packing else "not packed"
    lines = [f"{report.run}: data.seq_len={report.seq_len}, {packing}", "", *_table(report.splits), ""]
    for split in report.splits:
        if split.rows:
            ended = split.answers - split.answers_without_stop
            said = f"{ended:,} of {split.answers:,} answers end in a stop token"
            lines.append(f"  {split.name:<8}  {said}; {_turns(split.turns)}")
    stops = ", ".join(map(printable, report.stop_tokens)) or "none known"
    lines += [f"  {'stops':<8}  generation ends at {stops}"]
    lines += [f"  {'run':<8}  {describe_cost(report.cost)}"] if report.cost else []
    lines += [""]
    for finding in report.findings:
        lines += [*_render_finding(finding, is_colored), ""]
    return "\n".join([*lines, verdict(report.findings)])


def describe_cost(cost: Cost) -> str:
    """Return the cost of a run as a line."""
    epochs = "" if cost.epochs is None else f"{cost.epochs:g} epochs in "
    return (
        f"{epochs}{format_count(cost.steps, 'step')}, {cost.tokens:,} tokens, about {cost.flops:.1e} operations; "
        f"{cost.trained_params:,} parameters trained"
    )


_HEADS = ("rows", "sequences", "tokens", "trained", "filled", "shortest", "median", "p95", "longest")


def _table(splits: Sequence[SplitSummary]) -> Iterator[str]:
    rows: list[tuple[str, ...]] = [("", *_HEADS)]
    for split in splits:
        lengths = split.lengths
        rows.append((
            split.name, f"{split.rows:,}", f"{split.sequences:,}", f"{split.tokens:,}", f"{split.trained_share:.1%}",
            f"{split.packing_efficiency:.1%}",
            *(f"{length:,}" for length in (lengths.min, lengths.median, lengths.p95, lengths.max)),
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for (name, *cells), source in zip(rows, ["source", *(split.source for split in splits)], strict=True):
        aligned = "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        yield f"  {name:<{max(8, widths[0])}}  {aligned}  {printable(source, _PLACE)}"


def _turns(turns: Mapping[str, int]) -> str:
    """Return the number of rows by number of turns, the most common first."""
    common = sorted(turns.items(), key=lambda item: (-item[1], int(item[0])))
    shown = ", ".join(
        f"{count:,} of {number} turn{'' if number == '1' else 's'}" if number != "0" else f"{count:,} of plain text"
        for number, count in common[:_MAX_TURNS]
    )
    rest = sum(count for _, count in common[_MAX_TURNS:])
    return f"rows: {shown}" + (f", {rest:,} of other lengths" if rest else "")


def _render_finding(finding: Finding, is_colored: bool) -> Iterator[str]:
    severity, indent = finding.severity, " " * 18
    text = textwrap.fill(
        f"{severity:<8} {finding.split:<8} {printable(finding.message)}", _WIDTH, subsequent_indent=indent,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    color = _SEVERITY_COLORS[severity] if is_colored else ""
    yield text.replace(severity, _paint(severity, color), 1)
    for place in finding.places:
        yield f"    {printable(place, _PLACE)}"
    if finding.num_more:
        yield f"    … and {finding.num_more:,} more"


def verdict(findings: Sequence[Finding]) -> str:
    """Return how many errors, warnings and notes there are."""
    counts = Counter(finding.severity for finding in findings)
    said = ", ".join(format_count(counts[severity], severity) for severity in SEVERITIES if counts[severity])
    return said or "nothing to complain of"


def render_show(shown: ShownData, is_colored: bool) -> str:
    """Return the sequences of `data show` as a page."""
    if is_colored:
        trained, special, both = (
            _paint(word, _COLORS[kind])
            for word, kind in (("green", (True, False)), ("cyan", (False, True)), ("bold green", (True, True)))
        )
        legend = f"{trained} is trained, {special} a special token, {both} both; {_BREAK} is a line break of the text"
    else:
        legend = f"{'…'.join(_MARKS)} is trained, {_BREAK} is a line break of the text"
    lines = [
        f"{shown.split}, {printable(shown.source, _PLACE)}: "
        f"{format_count(shown.num_rows, 'row')} in {format_count(shown.num_sequences, 'sequence')}; "
        f"{format_count(shown.num_tokens, 'token')}, {shown.num_trained_tokens / shown.num_tokens:.1%} trained",
        legend,
    ]
    for sequence in shown.sequences:
        lines += ["", *_render_sequence(sequence, shown, is_colored)]
    return "\n".join(lines)


def _render_sequence(sequence: ShownSequence, shown: ShownData, is_colored: bool) -> Iterator[str]:
    frame, samples = _DIM if is_colored else "", sequence.samples
    num_tokens = sum(len(sample.input_ids) for sample in samples)
    num_trained = sum(sum(sample.trained) for sample in samples)
    yield _paint(
        f"━━ sequence {sequence.row:,} of {shown.num_sequences:,}: {format_count(len(samples), 'sample')}, "
        f"{num_tokens:,} of {shown.seq_len:,} tokens, {num_trained:,} trained",
        frame,
    )
    for number, sample in enumerate(samples, start=1):
        place = printable(sample.place or "a row that was not found again", _PLACE)
        counts = f"{format_count(len(sample.input_ids), 'token')}, {sum(sample.trained):,} trained"
        role = f" ({sample.role})" if sample.role else ""
        numbers = "".join(f", {name} {value:g}" for name, value in sample.numbers.items())
        yield _paint(f"── sample {number}{role}, {place}: {counts}{numbers}", frame)
        parts = []
        for is_trained, members in groupby(sample.segments, key=attrgetter("is_trained")):
            text = "".join(_render_segment(segment, is_colored) for segment in members)
            parts.append(f"{_MARKS[0]}{text}{_MARKS[1]}" if is_trained and not is_colored else text)
        yield "".join(parts).removesuffix("\n")
        if sample.num_cut_tokens:
            cut = f"{format_count(sample.num_cut_tokens, 'more token')} beyond data.seq_len={shown.seq_len}"
            yield _paint(f"── cut off here: {cut}", frame)


def _render_segment(segment: Segment, is_colored: bool) -> str:
    text, left_out = segment.text, len(segment.text) - _HEAD - _TAIL
    if left_out > 0:
        text = f"{text[:_HEAD]}\n… {left_out:,} more characters …\n{text[-_TAIL:]}"
    color = _COLORS[segment.is_trained, segment.is_special] if is_colored else ""
    *broken, last = [printable(line) for line in text.split("\n")]
    shown = "\n".join([*(_paint(line + _BREAK, color) for line in broken), _paint(last, color)])
    if not is_colored:
        for mark in _MARKS:
            shown = shown.replace(mark, f"\\u{ord(mark):04x}")
    return shown


def _paint(text: str, color: str) -> str:
    return f"{color}{text}{_END}" if color and text else text


def render_prepared(prepared: Preparation) -> str:
    """Return the text of what `data prepare` made and found."""
    splits = [(f"train.{index}", split) for index, split in enumerate(prepared.inputs.splits)]
    splits += [("eval", prepared.inputs.eval_split)] if prepared.inputs.eval_split else []
    lines = []
    for name, split in splits:
        shards, counts = format_count(split.num_shards, "shard"), split.counts
        if counts is None:
            lines.append(f"  {name:<8} {shards}, prepared while training goes on")
            continue
        rows, sequences = format_count(counts.num_rows, "row"), format_count(counts.num_sequences, "sequence")
        tokens = f"{format_count(counts.num_tokens, 'token')}, {counts.num_trained_tokens:,} trained"
        lines.append(f"  {name:<8} {rows} in {sequences} of {shards}, {tokens}")
    made = prepared.num_made
    head = f"{format_count(made, 'shard')} made" if made else "all is there already"
    return "\n".join([f"{head}: {printable(splits[0][1].address)}", *lines])
