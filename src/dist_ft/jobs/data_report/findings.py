"""What `dist-ft data check` says: the measures of the data, and what follows from them for a person.

Owns thresholds and words. Counting is `jobs/data_report/measure.py`'s; `limits.py` has the limits that a config sets,
`report/data_text.py` and `report/data_page.py` how it looks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from dist_ft.config import Config
from dist_ft.data.curation.filters import MAX_ROWS
from dist_ft.jobs.data_report.limits import SEVERITIES, Finding, Severity, limit_problems, share_of
from dist_ft.jobs.data_report.measure import NEAR, REPEATS, Measures, Noted, SplitCounts, measure
from dist_ft.jobs.plan.cost import estimate_cost, trained_shape

_FEW_SHARE = 0.01
"""Up to this share, cut samples and repeated rows are a note; beyond it a warning."""
_WORTH_PACKING = 0.5
"""Packing is suggested where it would leave this share of the sequences or less."""


def check_data(config: Config) -> dict[str, Any]:
    """Reads and renders all rows of a config and returns what they hold, as JSON values.

    Raises:
        UserError: The config's model or a source as a whole cannot be read.
    """
    shape = trained_shape(config)  # first: what is wrong with the model should not take a reading of all rows to find
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
        "near_copies": asdict(measures.near),
        "near_overlap": asdict(measures.leaks),
        "repeated_answers": asdict(measures.repeated_answers),
        "cost": estimate_cost(config, measures.splits, shape),
        "findings": [asdict(finding) for finding in _all_problems(config, measures)],
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
        "trained_share": share_of(split.num_trained_tokens, split.num_tokens),
        "packing_efficiency": share_of(split.num_tokens, room),
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
        "rows_with_personal_data": split.num_personal_rows,
        "personal": {kind: noted.count for kind, noted in sorted(split.personal.items())},
        "redacted": dict(sorted(split.redacted.items())),
        "removed": split.request.removed.counts,
        "histogram": _histogram(split.lengths),
    }


def _all_problems(config: Config, measures: Measures) -> list[Finding]:
    return [*limit_problems(config.data.limits, measures), *find_problems(measures)]


def find_problems(measures: Measures) -> list[Finding]:
    """Returns what is worth saying, errors first."""
    found = [finding for split in measures.splits for finding in _split_problems(split, measures.stops)]
    found += _repeat_problems(measures)
    return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))


def _split_problems(split: SplitCounts, stops: list[str]) -> Iterator[Finding]:
    yield from _unusable(split)
    yield from _untrained(split)
    yield from _long(split)
    yield from _ends(split, stops)
    yield from _texts(split)
    yield from _personal(split)
    yield from _packing(split)
    yield from _removed(split)


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
        share = share_of(split.long.count, split.lengths.total())
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


_NAMES = {
    "api_key": "API keys", "private_key": "private keys", "email": "e-mail addresses", "phone": "phone numbers",
    "card": "card numbers", "iban": "IBANs",
}  # fmt: skip


def _personal(split: SplitCounts) -> Iterator[Finding]:
    for kind, noted in sorted(split.personal.items()):
        what = f"{_NAMES[kind]} in {_count(noted, 'row')}; take them out, or name {kind} in data.redact"
        yield _finding("warning", split, what, noted)
    for kind, count in sorted(split.redacted.items()):
        what = f"data.redact puts <{kind.upper()}> in place of {_NAMES[kind]} in {count:,} rows"
        yield _finding("note", split, what, Noted(count))


def _removed(split: SplitCounts) -> Iterator[Finding]:
    removed = split.request.removed
    for rule, count in removed.counts.items():
        key = f"data.{split.name}.max_rows" if rule == MAX_ROWS else f"data.curation.{rule}"
        yield Finding("note", split.name, f"left out by {key}: {count:,} rows", count, removed.first.get(rule, []))


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
    if measures.leaks.count:
        what = (
            f"{measures.leaks.count:,} of {num_rows[True]:,} held-out rows are nearly a training row ({NEAR:.0%} "
            "alike or more), so held-out numbers flatter the model; remove them from one side, or set "
            "data.curation.near and against_eval"
        )
        yield Finding("warning", "eval", what, measures.leaks.count, measures.leaks.first)
    for name, repeats, total in (
        ("train", measures.repeats, num_rows[False]), ("eval", measures.eval_repeats, num_rows[True]),
    ):  # fmt: skip
        if repeats.count:
            what = f"exact copies of earlier rows: {repeats.count:,} ({share_of(repeats.count, total):.1%})"
            mend = "remove them if not meant" + (", or set data.curation.exact" if name == "train" else "")
            yield _weighed(repeats, total, name, f"{what}; {mend}")
    yield from _likeness_problems(measures, num_rows[False])


def _likeness_problems(measures: Measures, num_rows: int) -> Iterator[Finding]:
    near, answers = measures.near, measures.repeated_answers
    if near.count:
        share = share_of(near.count, num_rows)
        what = (
            f"near copies of earlier rows ({NEAR:.0%} alike or more): {near.count:,} ({share:.1%}); remove them if not "
            "meant, or set data.curation.near"
        )
        yield _weighed(near, num_rows, "train", what)
    if answers.count:
        share = share_of(answers.count, num_rows)
        what = (
            f"{answers.count:,} rows ({share:.1%}) give an answer that at least {REPEATS - 1} others give, too; it is "
            "learnt as the answer to anything, so thin them out"
        )
        yield _weighed(answers, num_rows, "train", what)


def _weighed(noted: Noted, total: int, split: str, message: str) -> Finding:
    severity: Severity = "note" if share_of(noted.count, total) <= _FEW_SHARE else "warning"
    return Finding(severity, split, message, noted.count, noted.first)


def _finding(severity: Severity, split: SplitCounts, message: str, noted: Noted) -> Finding:
    return Finding(severity, split.name, message, noted.count, noted.first)


def _count(noted: Noted, noun: str) -> str:
    return f"{noted.count:,} {noun}{'' if noted.count == 1 else 's'}"


_NUM_BARS = 40


def _histogram(lengths: Counter[int]) -> dict[str, Any]:
    """Returns samples by tokens in at most 40 equal steps: the width of a step, and how many are in each."""
    width = max(lengths, default=0) // _NUM_BARS + 1
    counts = Counter(dict.fromkeys(range(max(lengths, default=-1) // width + 1), 0))
    for length, count in lengths.items():
        counts[length // width] += count
    return {"width": width, "counts": [counts[step] for step in sorted(counts)]}


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
