"""Pages of text for `dist-ft data check`, `show` and `prepare`. All that comes from the data is made printable."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

from dist_ft.jobs.spec import Preparation
from dist_ft.printable import printable

_WIDTH = 110
_PLACE = 240
"""Characters of a place and what is wrong there."""
_HEAD, _TAIL = 3000, 1000
"""Characters that are shown of a long stretch of one kind, at its start and at its end."""
_MAX_TURNS = 6
_BREAK = "↵"


_COLORS = {(False, False): "", (False, True): "\x1b[36m", (True, False): "\x1b[32m", (True, True): "\x1b[1;32m"}
"""By (is trained, is special)."""
_SEVERITY_COLORS = {"error": "\x1b[1;31m", "warning": "\x1b[33m", "note": "\x1b[2m"}
_DIM, _END = "\x1b[2m", "\x1b[0m"
_MARKS = ("⟦", "⟧")
"""Around trained text where there is no colour: in files, pipes and what is copied."""


def render_check(report: dict[str, Any], is_colored: bool) -> str:
    """Returns the report of `data check` as a page."""
    packing = "packed" if report["packing"] else "not packed"
    lines = [f"{report['run']}: data.seq_len={report['seq_len']}, {packing}", "", *_table(report["splits"]), ""]
    lines += [f"  {split['name']:<8}  {_describe(split)}" for split in report["splits"] if split["rows"]]
    stops = ", ".join(map(printable, report["stop_tokens"])) or "none known"
    lines += [f"  {'stops':<8}  generation ends at {stops}"]
    lines += [f"  {'run':<8}  {describe_cost(report['cost'])}"] if report["cost"] else []
    lines += [""]
    for finding in report["findings"]:
        lines += [*_render_finding(finding, is_colored), ""]
    return "\n".join([*lines, verdict(report["findings"])])


def describe_cost(cost: dict[str, Any]) -> str:
    """Returns what a run on this data takes, in a line."""
    return (
        f"{_epochs(cost['epochs'])}{_count(cost['steps'], 'step')}, {cost['tokens']:,} tokens, about "
        f"{cost['flops']:.1e} operations; {cost['trained_params']:,} parameters trained"
    )


_HEADS = ("rows", "sequences", "tokens", "trained", "filled", "shortest", "median", "p95", "longest")


def _table(splits: Sequence[dict[str, Any]]) -> Iterator[str]:
    rows = [("", *_HEADS), *((split["name"], *_cells(split)) for split in splits)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for (name, *cells), source in zip(rows, ["source", *(split["source"] for split in splits)], strict=True):
        aligned = "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        yield f"  {name:<{max(8, widths[0])}}  {aligned}  {printable(source, _PLACE)}"


def _cells(split: dict[str, Any]) -> list[str]:
    return [
        f"{split['rows']:,}", f"{split['sequences']:,}", f"{split['tokens']:,}", f"{split['trained_share']:.1%}",
        f"{split['packing_efficiency']:.1%}",
        *(f"{split['lengths'][key]:,}" for key in ("min", "median", "p95", "max")),
    ]  # fmt: skip


def _describe(split: dict[str, Any]) -> str:
    ended = split["answers"] - split["answers_without_stop"]
    return f"{ended:,} of {split['answers']:,} answers end in a stop token; {_turns(split['turns'])}"


def _turns(turns: dict[str, int]) -> str:
    """Says how many rows have how many turns, the commonest first."""
    common = sorted(turns.items(), key=lambda item: (-item[1], int(item[0])))
    shown = ", ".join(
        f"{count:,} of {number} turn{'' if number == '1' else 's'}" if number != "0" else f"{count:,} of plain text"
        for number, count in common[:_MAX_TURNS]
    )
    rest = sum(count for _, count in common[_MAX_TURNS:])
    return f"rows: {shown}" + (f", {rest:,} of other lengths" if rest else "")


def _render_finding(finding: dict[str, Any], is_colored: bool) -> Iterator[str]:
    severity, indent = finding["severity"], " " * 18
    text = textwrap.fill(
        f"{severity:<8} {finding['split']:<8} {printable(finding['message'])}", _WIDTH, subsequent_indent=indent,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    color = _SEVERITY_COLORS[severity] if is_colored else ""
    yield text.replace(severity, _paint(severity, color), 1)
    for place in finding["places"]:
        yield f"    {printable(place, _PLACE)}"
    if finding["places"] and finding["count"] > len(finding["places"]):
        yield f"    … and {finding['count'] - len(finding['places']):,} more"


def verdict(findings: Sequence[dict[str, Any]]) -> str:
    """Returns how many errors, warnings and notes there are."""
    counts = {name: sum(f["severity"] == name for f in findings) for name in ("error", "warning", "note")}
    said = ", ".join(_count(count, name) for name, count in counts.items() if count)
    return said or "nothing to complain of"


def render_show(shown: dict[str, Any], is_colored: bool) -> str:
    """Returns the sequences of `data show` as a page."""
    lines = [
        f"{shown['split']}, {printable(shown['source'], _PLACE)}: "
        f"{_count(shown['num_rows'], 'row')} in {_count(shown['num_sequences'], 'sequence')}; "
        f"{_count(shown['num_tokens'], 'token')}, "
        f"{shown['num_trained_tokens'] / shown['num_tokens']:.1%} trained",
        _legend(is_colored),
    ]
    for sequence in shown["sequences"]:
        lines += ["", *_render_sequence(sequence, shown, is_colored)]
    return "\n".join(lines)


def _legend(is_colored: bool) -> str:
    if not is_colored:
        return f"{'…'.join(_MARKS)} is trained, {_BREAK} is a line break of the text"
    trained, special, both = (
        _paint(word, _COLORS[kind])
        for word, kind in (("green", (True, False)), ("cyan", (False, True)), ("bold green", (True, True)))
    )
    return f"{trained} is trained, {special} a special token, {both} both; {_BREAK} is a line break of the text"


def _render_sequence(sequence: dict[str, Any], shown: dict[str, Any], is_colored: bool) -> Iterator[str]:
    frame = _DIM if is_colored else ""
    samples = sequence["samples"]
    num_tokens = sum(len(sample["input_ids"]) for sample in samples)
    num_trained = sum(sum(sample["trained"]) for sample in samples)
    yield _paint(
        f"━━ sequence {sequence['row']:,} of {shown['num_sequences']:,}: {_count(len(samples), 'sample')}, "
        f"{num_tokens:,} of {shown['seq_len']:,} tokens, {num_trained:,} trained",
        frame,
    )
    for number, sample in enumerate(samples, start=1):
        place = printable(sample["place"] or "a row that was not found again", _PLACE)
        counts = f"{_count(len(sample['input_ids']), 'token')}, {sum(sample['trained']):,} trained"
        yield _paint(f"── sample {number}, {place}: {counts}", frame)
        yield _render_text(sample["segments"], is_colored)
        if sample["num_cut_tokens"]:
            cut = f"{_count(sample['num_cut_tokens'], 'more token')} beyond data.seq_len={shown['seq_len']}"
            yield _paint(f"── cut off here: {cut}", frame)


def _render_text(segments: Sequence[dict[str, Any]], is_colored: bool) -> str:
    parts = []
    for is_trained, members in groupby(segments, key=itemgetter("is_trained")):
        text = "".join(_render_segment(segment, is_colored) for segment in members)
        parts.append(f"{_MARKS[0]}{text}{_MARKS[1]}" if is_trained and not is_colored else text)
    return "".join(parts).removesuffix("\n")


def _render_segment(segment: dict[str, Any], is_colored: bool) -> str:
    color = _COLORS[segment["is_trained"], segment["is_special"]] if is_colored else ""
    *broken, last = [printable(line) for line in _shorten(segment["text"]).split("\n")]
    text = [*(_paint(line + _BREAK, color) for line in broken), _paint(last, color)]
    return "\n".join(text if is_colored else map(_escape_marks, text))


def _escape_marks(text: str) -> str:
    for mark in _MARKS:
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return text


def _shorten(text: str) -> str:
    left_out = len(text) - _HEAD - _TAIL
    return f"{text[:_HEAD]}\n… {left_out:,} more characters …\n{text[-_TAIL:]}" if left_out > 0 else text


def _paint(text: str, color: str) -> str:
    return f"{color}{text}{_END}" if color and text else text


def render_prepared(prepared: Preparation) -> str:
    """Returns what `data prepare` made and found."""
    splits = [(f"train.{index}", split) for index, split in enumerate(prepared.inputs.splits)]
    splits += [("eval", prepared.inputs.eval_split)] if prepared.inputs.eval_split else []
    lines = [
        f"  {name:<8} {_count(split.num_rows, 'row')} in {_count(split.num_sequences, 'sequence')} of "
        f"{_count(split.num_shards, 'shard')}, {_count(split.num_tokens, 'token')}, "
        f"{split.num_trained_tokens:,} trained"
        for name, split in splits
    ]
    made = prepared.num_made
    head = f"{_count(made, 'shard')} made" if made else "all is there already"
    return "\n".join([f"{head}: {printable(splits[0][1].address)}", *lines])


def _epochs(epochs: float | None) -> str:
    return "" if epochs is None else f"{epochs:g} epochs in "


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
