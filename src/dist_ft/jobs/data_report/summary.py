"""Defines the values that `dist-ft data check` and `data show` print. Torch-free, like `report/`.

`--json` prints a `DataReport` or a `ShownData` field by field.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dist_ft.jobs.plan.planned import Cost

FEW = 5
"""The most locations that are named for a count."""
_PLACE = 1000
"""Most characters of a location with its problem, because the message of a template may have any length."""
Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """One thing that a person should know.

    Attributes:
        severity: `error` if a run would refuse to start or a limit is exceeded; `warning` if a run would probably learn
            or measure the wrong thing; `note` for the rest.
        split: `train.0`, `eval`, or `train` for all training sources.
        message: One line: what was found, and what to do.
        count: Rows, samples or answers concerned.
        places: Locations of the first few, one line each.
    """

    severity: Severity
    split: str
    message: str
    count: int
    places: list[str]

    @property
    def num_more(self) -> int:
        """Number of locations that are not named; 0 if none is named."""
        return max(0, self.count - len(self.places)) if self.places else 0


def share_of(part: int, whole: int) -> float:
    """Return the share of a part; 0 if the whole is empty."""
    return round(part / whole, 4) if whole else 0.0


@dataclass
class Noted:
    """A count, with the first few locations."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, text: str) -> None:
        """Add one to the count."""
        self.count += 1
        if len(self.first) < FEW:
            self.first.append(text[:_PLACE])


@dataclass(frozen=True)
class Lengths:
    """Tokens of the samples of a split, before the cut."""

    min: int
    median: int
    p95: int
    max: int


@dataclass(frozen=True)
class Histogram:
    """Samples by tokens, in at most 40 equal steps.

    Attributes:
        width: Tokens of a step.
        counts: Samples of each step, from 0 tokens on.
    """

    width: int
    counts: tuple[int, ...]


@dataclass(frozen=True)
class SplitSummary:
    """The numbers of one split.

    Attributes:
        name: `train.0` as in `data.train.0`, or `eval`.
        source: Where its rows come from.
        rows: Rows that could be read.
        samples: Samples that they give.
        sequences: Sequences after packing.
        tokens: Tokens of all sequences.
        trained_tokens: Tokens whose prediction is trained.
        trained_share: `trained_tokens` divided by `tokens`.
        packing_efficiency: Mean share of `data.seq_len` that a sequence fills.
        sequences_if_packed: Sequences with `data.packing=true`.
        lengths: Tokens of the samples.
        turns: Turns of a row → rows.
        answers: Answers that are trained.
        answers_without_stop: Answers whose last token does not end generation.
        unreadable_rows: Rows that cannot be read.
        refused_rows: Rows that the chat template refuses.
        untrained_rows: Rows without a trained token.
        empty_answers: Rows with an empty answer.
        long_samples: Samples longer than `data.seq_len`.
        doubled_bos: Samples that begin with two BOS tokens.
        rows_with_special_text: Rows whose text holds special tokens.
        unread_keys: Rows with a key to which nothing gives a meaning, by key.
        rows_with_personal_data: Rows with personal data or secrets that are not redacted.
        personal: Rows with personal data or secrets that are not redacted, by kind.
        redacted: Rows in which `data.redact` finds something, by kind.
        removed: Rows that the config removes, by rule.
        histogram: Samples by tokens.
        pairs: Pairs of answers.
        longer_chosen: Pairs whose chosen answer is the longer one.
        longer_rejected: Pairs whose rejected answer is the longer one.
        good_answers: Answers with a true label.
        bad_answers: Answers with a false label.
    """

    name: str
    source: str
    rows: int
    samples: int
    sequences: int
    tokens: int
    trained_tokens: int
    trained_share: float
    packing_efficiency: float
    sequences_if_packed: int
    lengths: Lengths
    turns: dict[str, int]
    answers: int
    answers_without_stop: int
    unreadable_rows: int
    refused_rows: int
    untrained_rows: int
    empty_answers: int
    long_samples: int
    doubled_bos: int
    rows_with_special_text: int
    unread_keys: dict[str, int]
    rows_with_personal_data: int
    personal: dict[str, int]
    redacted: dict[str, int]
    removed: dict[str, int]
    histogram: Histogram
    pairs: int = 0
    longer_chosen: int = 0
    longer_rejected: int = 0
    good_answers: int = 0
    bad_answers: int = 0


@dataclass(frozen=True)
class DataReport:
    """The report on the data of a run.

    Attributes:
        run: Name of the run.
        seq_len: `data.seq_len`.
        packing: `data.packing`.
        stop_tokens: Tokens at which generation ends.
        splits: Training sources in order, then the held-out split.
        repeated_rows: Training rows that equal an earlier one.
        repeated_eval_rows: Held-out rows that equal an earlier held-out row.
        overlap: Held-out rows that equal a training row.
        near_copies: Training rows that are similar to an earlier one.
        near_overlap: Held-out rows that are similar to a training row.
        repeated_answers: Training rows with an answer that many rows share.
        cost: Cost of a run; None if no run is possible.
        findings: Findings for the user, limits first.
    """

    run: str
    seq_len: int
    packing: bool
    stop_tokens: tuple[str, ...]
    splits: tuple[SplitSummary, ...]
    repeated_rows: Noted
    repeated_eval_rows: Noted
    overlap: Noted
    near_copies: Noted
    near_overlap: Noted
    repeated_answers: Noted
    cost: Cost | None
    findings: tuple[Finding, ...]

    @property
    def has_errors(self) -> bool:
        """Whether a run would refuse the data, or a limit is exceeded."""
        return any(finding.severity == "error" for finding in self.findings)


@dataclass(frozen=True)
class Segment:
    """Neighbouring tokens of one kind, as text."""

    text: str
    num_tokens: int
    is_trained: bool
    is_special: bool


@dataclass(frozen=True)
class ShownSample:
    """One sample of a sequence.

    Attributes:
        place: `file:line` that it comes from; None when its row is not found again.
        num_cut_tokens: Tokens that the cut at `data.seq_len` left out; None when its row is not found again.
        input_ids: Tokens of the sample.
        trained: For each token, whether its prediction is trained.
        segments: The tokens as text.
        role: What it is in its record, such as `chosen`; empty for conversations and texts.
        numbers: What its objective keeps of it besides, such as a label.
    """

    place: str | None
    num_cut_tokens: int | None
    input_ids: list[int]
    trained: list[bool]
    segments: list[Segment]
    role: str = ""
    numbers: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ShownSequence:
    """One sequence of a split; `row` is counted from 1."""

    row: int
    samples: list[ShownSample]


@dataclass(frozen=True)
class ShownData:
    """Some sequences of a split, and its totals.

    Attributes:
        source: Source of the rows.
        split: `train.0` as in `data.train.0`, or `eval`.
        seq_len: `data.seq_len`.
        num_rows: Rows of the split.
        num_sequences: Sequences of the split.
        num_tokens: Tokens of the split.
        num_trained_tokens: Tokens whose prediction is trained.
        sequences: The sequences that are shown.
    """

    source: str
    split: str
    seq_len: int
    num_rows: int
    num_sequences: int
    num_tokens: int
    num_trained_tokens: int
    sequences: list[ShownSequence]
