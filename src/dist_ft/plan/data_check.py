"""What `dist-ft data check` says: the measures of the data, and what follows from them for a person.

Owns thresholds and words. Counting is `tasks/data_scan.py`'s, the page `data_text.py`'s.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from dist_ft.config import Config
from dist_ft.tasks.data_scan import Measures, Noted, SplitCounts, measure

_FEW_SHARE = 0.01
"""Up to this share, cut samples and repeated rows are a note; beyond it a warning."""
_WORTH_PACKING = 0.5
"""Packing is suggested where it would leave this share of the sequences or less."""

Severity = Literal["error", "warning", "note"]
_ORDER: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """One thing that a person should know.

    Attributes:
        severity: `error` where a run would refuse to start; `warning` where it would learn or measure what was
            hardly meant; `note` for the rest.
        split: `train.0`, `eval`, or `data` for what concerns all.
        message: One line: what was found, and what to do.
        count: Rows, samples or answers concerned.
        places: The first few of them, one line each.
    """

    severity: Severity
    split: str
    message: str
    count: int
    places: list[str]


def check_data(config: Config) -> dict[str, Any]:
    """Reads and renders all rows of a config and returns what they hold, as JSON values.

    Raises:
        UserError: The config's model or a source as a whole cannot be read.
    """
    measures = measure(config)
    return {
        "run": config.run.name,
        "seq_len": config.data.seq_len,
        "packing": config.data.packing,
        "stop_tokens": measures.stops,
        "splits": [describe_split(split) for split in measures.splits],
        "repeated_rows": asdict(measures.repeats),
        "repeated_eval_rows": asdict(measures.eval_repeats),
        "overlap": asdict(measures.overlap),
        "findings": [asdict(finding) for finding in find_problems(measures)],
    }


def describe_split(split: SplitCounts) -> dict[str, Any]:
    """Returns the numbers of a split as JSON values."""
    room = split.num_sequences * split.request.seq_len
    return {
        "name": split.name,
        "source": split.request.shown,
        "rows": split.num_rows,
        "samples": split.lengths.total(),
        "sequences": split.num_sequences,
        "tokens": split.num_tokens,
        "trained_tokens": split.num_trained_tokens,
        "trained_share": _share(split.num_trained_tokens, split.num_tokens),
        "packing_efficiency": _share(split.num_tokens, room),
        "sequences_if_packed": split.num_packed,
        "lengths": _quantiles(split.lengths),
        "turns": {str(turns): split.turns[turns] for turns in sorted(split.turns)},
        "answers": split.num_answers,
        "answers_without_stop": split.unended.count,
        "unreadable_rows": split.unreadable.count,
        "refused_rows": split.refused.count,
        "untrained_rows": split.untrained.count,
        "empty_answers": split.empty_answers.count,
        "long_samples": split.long.count,
        "doubled_bos": split.bos_doubled.count,
        "rows_with_special_text": split.control_text.count,
    }


def find_problems(measures: Measures) -> list[Finding]:
    """Returns what is worth saying, errors first."""
    found = [finding for split in measures.splits for finding in _split_problems(split, measures.stops)]
    found += _repeat_problems(measures)
    return sorted(found, key=lambda finding: _ORDER.index(finding.severity))


def _split_problems(split: SplitCounts, stops: list[str]) -> Iterator[Finding]:
    yield from _unusable(split)
    yield from _untrained(split)
    yield from _long(split)
    yield from _ends(split, stops)
    yield from _texts(split)
    yield from _packing(split)


def _unusable(split: SplitCounts) -> Iterator[Finding]:
    is_skipped = split.request.bad_rows == "skip"
    severity: Severity = "warning" if is_skipped else "error"
    fate = "would be left out" if is_skipped else "would stop a run"
    if split.unreadable.count:
        what = f"{_count(split.unreadable, 'row')} cannot be read and {fate}; mend or remove"
        yield _finding(severity, split, what, split.unreadable)
    if split.refused.count:
        what = (
            f"the chat template refuses {_count(split.refused, 'row')}, which {fate}; change what it complains of, or "
            "set data.chat_template to one that takes it"
        )
        yield _finding(severity, split, what, split.refused)
    if not split.num_rows:
        where = "" if not split.request.held_out else f" fall on this side with data.eval={split.request.held_out}"
        what = f"no rows{where}; name another source" + (" or fraction" if where else "")
        yield _finding("error", split, what, Noted())


def _untrained(split: SplitCounts) -> Iterator[Finding]:
    if not split.untrained.count:
        return
    if not split.num_trained_tokens:
        what = (
            f"not one token would be trained; raise data.seq_len={split.request.seq_len} if it cuts the answers off, "
            "or give the rows answers"
        )
        yield _finding("error", split, what, split.untrained)
        return
    hidden = f" ({split.num_hidden_rows:,} because data.seq_len={split.request.seq_len} cuts the answer off)"
    what = (
        f"left out for want of a trained token: {_count(split.untrained, 'row')}"
        f"{hidden if split.num_hidden_rows else ''}; give them an answer that fits"
    )
    yield _finding("warning", split, what, split.untrained)


_LONG = {"truncate": "cut at the end", "drop": "left out", "split": "made into pieces", "error": "what stops a run"}


def _long(split: SplitCounts) -> Iterator[Finding]:
    if split.long.count:
        request, longest = split.request, max(split.lengths)
        share = _share(split.long.count, split.lengths.total())
        what = (
            f"beyond data.seq_len={request.seq_len} and {_LONG[request.long_samples]}: {_count(split.long, 'sample')} "
            f"({share:.1%}); raise it (the longest has {longest:,} tokens), shorten them or set data.long_samples"
        )
        severity: Severity = "note" if share <= _FEW_SHARE or request.long_samples == "split" else "warning"
        yield _finding("error" if request.long_samples == "error" else severity, split, what, split.long)


def _ends(split: SplitCounts, stops: list[str]) -> Iterator[Finding]:
    if split.unended.count:
        what = (
            f"{split.unended.count:,} of {split.num_answers:,} answers lack a token at the end that stops generation "
            f"({', '.join(stops) or 'the tokenizer has none'}), so stopping is not learnt; use a chat template whose "
            "turns end in one"
        )
        yield _finding("warning", split, what, split.unended)


def _texts(split: SplitCounts) -> Iterator[Finding]:
    if split.empty_answers.count:
        what = f"empty answers in {_count(split.empty_answers, 'row')} teach to say nothing; fill or remove them"
        yield _finding("warning", split, what, split.empty_answers)
    if split.bos_doubled.count:
        what = (
            f"two BOS tokens begin {_count(split.bos_doubled, 'sample')}; take one out of the chat template or of the "
            "rows"
        )
        yield _finding("warning", split, what, split.bos_doubled)
    if split.control_text.count:
        what = (
            f"text of {_count(split.control_text, 'row')} holds special tokens, which can end a turn or fake one; "
            "take them out"
        )
        yield _finding("warning", split, what, split.control_text)


def _packing(split: SplitCounts) -> Iterator[Finding]:
    if split.num_sequences and split.num_packed <= _WORTH_PACKING * split.num_sequences:
        what = f"data.packing=true would make {split.num_packed:,} sequences of {split.num_sequences:,}"
        yield _finding("note", split, what, Noted())


def _repeat_problems(measures: Measures) -> Iterator[Finding]:
    num_rows = {True: 0, False: 0}
    for split in measures.splits:
        num_rows[split.name == "eval"] += split.num_rows
    if measures.overlap.count:
        what = (
            f"the training data holds {measures.overlap.count:,} of {num_rows[True]:,} held-out rows, too, so held-out "
            "numbers flatter the model; remove them from one side"
        )
        yield Finding("warning", "eval", what, measures.overlap.count, measures.overlap.first)
    for name, repeats, total in (
        ("train", measures.repeats, num_rows[False]), ("eval", measures.eval_repeats, num_rows[True]),
    ):  # fmt: skip
        if repeats.count:
            share = _share(repeats.count, total)
            severity: Severity = "note" if share <= _FEW_SHARE else "warning"
            what = f"exact copies of earlier rows: {repeats.count:,} ({share:.1%}); remove them if not meant"
            yield Finding(severity, name, what, repeats.count, repeats.first)


def _finding(severity: Severity, split: SplitCounts, message: str, noted: Noted) -> Finding:
    return Finding(severity, split.name, message, noted.count, noted.first)


def _count(noted: Noted, noun: str) -> str:
    return f"{noted.count:,} {noun}{'' if noted.count == 1 else 's'}"


def _share(part: int, whole: int) -> float:
    return round(part / whole, 4) if whole else 0.0


def _quantiles(histogram: Counter[int]) -> dict[str, int]:
    return {
        "min": min(histogram, default=0),
        "median": _quantile(histogram, 0.5),
        "p95": _quantile(histogram, 0.95),
        "max": max(histogram, default=0),
    }


def _quantile(histogram: Counter[int], share: float) -> int:
    """Returns the smallest value that at least this share of all reaches or stays below."""
    seen, needed = 0, share * histogram.total()
    for value in sorted(histogram):
        seen += histogram[value]
        if seen >= needed:
            return value
    return 0
