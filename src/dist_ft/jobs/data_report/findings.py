"""Turns the measures of the data into what `dist-ft data check` reports: numbers and findings.

Owns thresholds and texts. `measure.py` counts; `limits.py` has the limits that a config sets; `report/data_text.py` and
`report/data_page.py` render the report.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from dist_ft.config import Config
from dist_ft.data.curation.filters import MAX_ROWS
from dist_ft.jobs.data_report.limits import limit_problems
from dist_ft.jobs.data_report.measure import NEAR, REPEATS, Measures, SplitCounts, measure
from dist_ft.jobs.data_report.summary import (
    SEVERITIES,
    DataReport,
    Finding,
    Histogram,
    Lengths,
    Noted,
    Severity,
    SplitSummary,
    share_of,
)
from dist_ft.jobs.plan.cost import estimate_cost, trained_shape
from dist_ft.printable import excerpt, format_count

_NUM_BARS = 40
_FEW_SHARE = 0.01
"""Up to this share, cut samples and repeated rows are a note; beyond it a warning."""
_ONE_SIDED = 0.8
"""Share of pairs with the longer answer on one side from which on length is called a shortcut."""
_ENOUGH_PAIRS = 10
_WORTH_PACKING = 0.5
"""Packing is suggested if it leaves at most this share of the sequences."""


def check_data(config: Config) -> DataReport:
    """Read and render all rows of a config and return what they hold.

    Raises:
        UserError: The config's model or a source as a whole cannot be read.
    """
    shape = trained_shape(config)  # first, so that an error of the model is found before reading all rows
    measures = measure(config)
    return DataReport(
        run=config.run.name,
        seq_len=config.data.seq_len,
        packing=config.data.packing,
        stop_tokens=tuple(measures.stops),
        splits=tuple(map(summarize, measures.splits)),
        repeated_rows=measures.repeats,
        repeated_eval_rows=measures.eval_repeats,
        overlap=measures.overlap,
        near_copies=measures.near,
        near_overlap=measures.leaks,
        repeated_answers=measures.repeated_answers,
        cost=estimate_cost(config, measures.splits, shape),
        findings=(*limit_problems(config.data.limits, measures), *find_problems(measures)),
    )


def find_problems(measures: Measures) -> list[Finding]:
    """Return the findings that do not come from a limit, errors first."""
    found: list[Finding] = []
    for split in measures.splits:
        found += [*_row_problems(split), *_sample_problems(split, measures.stops), *_text_problems(split)]
        found += _preference_problems(split)
    found += _repeat_problems(measures)
    return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))


def _row_problems(split: SplitCounts) -> Iterator[Finding]:
    request = split.request
    is_skipped = request.bad_rows == "skip"
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
        where = "" if not request.held_out else f" fall on this side with data.eval={request.held_out}"
        what = f"no rows{where}; name another source" + (" or fraction" if where else "")
        yield _finding("error", split, what, Noted())
    if split.untrained.count and not split.num_trained_tokens:
        what = (
            f"not one token would be trained; raise data.seq_len={request.seq_len} if it cuts the answers off, "
            "or give the rows answers"
        )
        yield _finding("error", split, what, split.untrained)
    elif split.untrained.count:
        hidden = f" ({split.num_hidden_rows:,} because data.seq_len={request.seq_len} cuts the answer off)"
        what = (
            f"left out for want of a trained token: {_count(split.untrained, 'row')}"
            f"{hidden if split.num_hidden_rows else ''}; give them an answer that fits"
        )
        yield _finding("warning", split, what, split.untrained)


_LONG = {"truncate": "cut at the end", "drop": "left out", "split": "made into pieces", "error": "what stops a run"}


def _sample_problems(split: SplitCounts, stops: Sequence[str]) -> Iterator[Finding]:
    if split.long.count:
        request, longest = split.request, max(split.lengths)
        share = share_of(split.long.count, split.lengths.total())
        what = (
            f"beyond data.seq_len={request.seq_len} and {_LONG[request.long_samples]}: {_count(split.long, 'sample')} "
            f"({share:.1%}); raise it (the longest has {longest:,} tokens), shorten them or set data.long_samples"
        )
        severity: Severity = "note" if share <= _FEW_SHARE or request.long_samples == "split" else "warning"
        yield _finding("error" if request.long_samples == "error" else severity, split, what, split.long)
    if split.unended.count:
        what = (
            f"{split.unended.count:,} of {split.num_answers:,} answers lack a token at the end that stops generation "
            f"({', '.join(stops) or 'the tokenizer has none'}), so stopping is not learnt; use a chat template whose "
            "turns end in one"
        )
        yield _finding("warning", split, what, split.unended)


def _preference_problems(split: SplitCounts) -> Iterator[Finding]:
    """Yield findings about pairs whose longer answer is on one side, and about labels that nearly all agree."""
    for side, longer in (("chosen", split.longer_chosen), ("rejected", split.longer_rejected)):
        if split.num_pairs >= _ENOUGH_PAIRS and longer.count > _ONE_SIDED * split.num_pairs:
            what = (
                f"the {side} answer is the longer one in {longer.count:,} of {split.num_pairs:,} pairs "
                f"({longer.count / split.num_pairs:.0%}), so length alone tells the answers apart; add pairs of the "
                "other kind, or take a loss of means of tokens (objective.loss=sigmoid_norm, ipo or simpo)"
            )
            yield _finding("warning", split, what, longer)
    good, bad = split.good.count, split.bad.count
    if good + bad >= _ENOUGH_PAIRS and split.name != "eval" and not (bad <= good <= 4 / 3 * bad):
        what = (
            f"labels: {good:,} good answers, {bad:,} bad ones; set objective.desirable_weight and undesirable_weight "
            "so that weight times rows of the good is 1 to 4/3 of that of the bad"
        )
        yield _finding("note", split, what, Noted())


_NAMES = {
    "api_key": "API keys", "private_key": "private keys", "email": "e-mail addresses", "phone": "phone numbers",
    "card": "card numbers", "iban": "IBANs",
}  # fmt: skip


def _text_problems(split: SplitCounts) -> Iterator[Finding]:
    """Yield findings about the texts of a split, and about what the config does or could do with its rows."""
    for key, noted in sorted(split.unread.items()):
        what = (
            f"{excerpt(key)} is not read in {_count(noted, 'row')}; if it says what to train, see docs/data.md, else "
            "name it in data.train[].ignore"
        )
        yield _finding("warning", split, what, noted)
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
    for kind, noted in sorted(split.personal.items()):
        what = f"{_NAMES[kind]} in {_count(noted, 'row')}; take them out, or name {kind} in data.redact"
        yield _finding("warning", split, what, noted)
    for kind, count in sorted(split.redacted.items()):
        what = f"data.redact puts <{kind.upper()}> in place of {_NAMES[kind]} in {count:,} rows"
        yield _finding("note", split, what, Noted(count))
    if split.num_sequences and split.num_packed <= _WORTH_PACKING * split.num_sequences:
        what = f"data.packing=true would make {split.num_packed:,} sequences of {split.num_sequences:,}"
        yield _finding("note", split, what, Noted())
    removed = split.request.removed
    for rule, count in removed.counts.items():
        key = f"data.{split.name}.max_rows" if rule == MAX_ROWS else f"data.curation.{rule}"
        yield Finding("note", split.name, f"left out by {key}: {count:,} rows", count, removed.first.get(rule, []))


def _repeat_problems(measures: Measures) -> Iterator[Finding]:
    num_held_out = sum(split.num_rows for split in measures.splits if split.name == "eval")
    num_trained_on = sum(split.num_rows for split in measures.splits if split.name != "eval")
    if measures.overlap.count:
        what = (
            f"the training data holds {measures.overlap.count:,} of {num_held_out:,} held-out rows, too, so held-out "
            "numbers flatter the model; remove them from one side"
        )
        yield Finding("warning", "eval", what, measures.overlap.count, measures.overlap.first)
    if measures.leaks.count:
        what = (
            f"{measures.leaks.count:,} of {num_held_out:,} held-out rows are nearly a training row ({NEAR:.0%} "
            "alike or more), so held-out numbers flatter the model; remove them from one side, or set "
            "data.curation.near and against_eval"
        )
        yield Finding("warning", "eval", what, measures.leaks.count, measures.leaks.first)
    for name, repeats, total in (
        ("train", measures.repeats, num_trained_on), ("eval", measures.eval_repeats, num_held_out),
    ):  # fmt: skip
        if repeats.count:
            what = f"exact copies of earlier rows: {repeats.count:,} ({share_of(repeats.count, total):.1%})"
            mend = "remove them if not meant" + (", or set data.curation.exact" if name == "train" else "")
            yield _weighed(repeats, total, name, f"{what}; {mend}")
    near, answers = measures.near, measures.repeated_answers
    if near.count:
        what = (
            f"near copies of earlier rows ({NEAR:.0%} alike or more): {near.count:,} "
            f"({share_of(near.count, num_trained_on):.1%}); remove them if not meant, or set data.curation.near"
        )
        yield _weighed(near, num_trained_on, "train", what)
    if answers.count:
        what = (
            f"{answers.count:,} rows ({share_of(answers.count, num_trained_on):.1%}) give an answer that at least "
            f"{REPEATS - 1} others give, too; it is learnt as the answer to anything, so thin them out"
        )
        yield _weighed(answers, num_trained_on, "train", what)


def _weighed(noted: Noted, total: int, split: str, message: str) -> Finding:
    severity: Severity = "note" if share_of(noted.count, total) <= _FEW_SHARE else "warning"
    return Finding(severity, split, message, noted.count, noted.first)


def _finding(severity: Severity, split: SplitCounts, message: str, noted: Noted) -> Finding:
    return Finding(severity, split.name, message, noted.count, noted.first)


def _count(noted: Noted, noun: str) -> str:
    return format_count(noted.count, noun)


def summarize(split: SplitCounts) -> SplitSummary:
    """Return the numbers of a split."""
    longest = max(split.lengths, default=0)
    width = longest // _NUM_BARS + 1
    bars = [0] * (longest // width + 1 if split.lengths else 0)
    for length, count in split.lengths.items():
        bars[length // width] += count
    return SplitSummary(
        name=split.name,
        source=split.request.shown,
        rows=split.num_rows,
        samples=split.lengths.total(),
        sequences=split.num_sequences,
        tokens=split.num_tokens,
        trained_tokens=split.num_trained_tokens,
        trained_share=share_of(split.num_trained_tokens, split.num_tokens),
        packing_efficiency=share_of(split.num_tokens, split.num_sequences * split.request.seq_len),
        sequences_if_packed=split.num_packed,
        lengths=Lengths(
            min=min(split.lengths, default=0),
            median=quantile(split.lengths, 0.5),
            p95=quantile(split.lengths, 0.95),
            max=longest,
        ),
        turns={str(turns): split.turns[turns] for turns in sorted(split.turns)},
        answers=split.num_answers,
        answers_without_stop=split.unended.count,
        unreadable_rows=split.unreadable.count,
        refused_rows=split.refused.count,
        untrained_rows=split.untrained.count,
        empty_answers=split.empty_answers.count,
        long_samples=split.long.count,
        doubled_bos=split.bos_doubled.count,
        rows_with_special_text=split.control_text.count,
        unread_keys={key: noted.count for key, noted in sorted(split.unread.items())},
        rows_with_personal_data=split.num_personal_rows,
        personal={kind: noted.count for kind, noted in sorted(split.personal.items())},
        redacted=dict(sorted(split.redacted.items())),
        removed=dict(split.request.removed.counts),
        histogram=Histogram(width, tuple(bars)),
        pairs=split.num_pairs,
        longer_chosen=split.longer_chosen.count,
        longer_rejected=split.longer_rejected.count,
        good_answers=split.good.count,
        bad_answers=split.bad.count,
    )


def quantile(lengths: Counter[int], share: float) -> int:
    """Return the smallest length that at least this share of all samples does not exceed."""
    seen, needed = 0, share * lengths.total()
    for length in sorted(lengths):
        seen += lengths[length]
        if seen >= needed:
            return length
    return 0
