"""Measures the data of a run: reads and renders every row once, as the run's own preparation does.

Owns the counting; `findings.py` interprets the counts. Memory holds two hashes per row, the memory that
`data/curation/near.py` needs, and the first few locations for each count.
"""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import xxhash

from dist_ft.config import Config
from dist_ft.data.curation.exact import Keys, Numbers, find_repeats, find_shared
from dist_ft.data.curation.near import SignatureFile, Signatures, find_near, find_near_shared
from dist_ft.data.curation.personal import PersonalKind, find_personal, mask
from dist_ft.data.rows.scan import BadRow, Row
from dist_ft.data.rows.texts import compared_text, record_key
from dist_ft.data.shards.counts import MAX_UNREAD
from dist_ft.data.shards.make import RenderMany, render_rows, usable
from dist_ft.data.shards.pack import plan_bins
from dist_ft.data.shards.request import SplitRequest, is_window_full, plan_split, rows_of_shard, rows_of_split
from dist_ft.data.sources.listing import list_sources
from dist_ft.jobs.curate import curate
from dist_ft.jobs.data_report.summary import FEW, Noted
from dist_ft.jobs.splits import cache_address, make_renderer, split_requests, with_fraction
from dist_ft.model.base import Tokenizer, load_generation_config, load_tokenizer, stop_tokens
from dist_ft.records import Labelled, Preference, Sample
from dist_ft.storage.objects import open_store

NEAR = 0.8
"""Least similarity of two rows that are called near copies, as in `data.curation.near`."""
REPEATS = 10
"""Rows with the same answer from which the answer is called repeated."""
_MIN_ANSWER = 32
"""Least characters of an answer that is compared; shorter ones, such as labels, repeat on purpose."""


@dataclass
class SplitCounts:
    """Holds the counts of one split.

    Attributes:
        name: `train.0` as in `data.train.0`, or `eval`.
        request: The split that a run would prepare.
        num_rows: Rows that could be read.
        unreadable: Rows that are not a conversation, with the problem.
        refused: Rows that the chat template refuses, with its message.
        untrained: Rows left out because none of their tokens would be trained.
        num_hidden_rows: Untrained rows whose trained tokens are all after the cut.
        long: Samples longer than `data.seq_len`.
        bos_doubled: Samples that begin with two BOS tokens.
        empty_answers: Rows with an assistant turn that says and calls nothing.
        control_text: Rows with text that the tokenizer reads as a special token.
        unread: By key, rows with a key to which nothing gives a meaning.
        personal: By kind, rows with personal data or secrets that `data.redact` does not name; values masked.
        num_personal_rows: Rows with any of them.
        redacted: By kind, rows in which `data.redact` finds something.
        num_answers: Runs of trained tokens that end in the used part of a sample.
        unended: Such runs whose last token does not end generation.
        turns: Turns of a row → rows.
        lengths: Tokens of a sample before the cut → samples.
        num_sequences: Sequences of the run.
        num_packed: Sequences if they were packed.
        keys: Hash of each row's content.
        answers: Hash of each row's answer; 0 for a short answer.
        num_pairs: Pairs of answers.
        longer_chosen: Pairs whose chosen answer is the longer one.
        longer_rejected: Pairs whose rejected answer is the longer one.
        good: Answers with a true label.
        bad: Answers with a false label.
        window: Lengths of the slots that are not packed yet: of a sample, or of all samples of a pair.
        num_window_rows: Rows of these samples.
        num_window_tokens: Tokens of these samples.
    """

    name: str
    request: SplitRequest
    num_rows: int = 0
    unreadable: Noted = field(default_factory=Noted)
    refused: Noted = field(default_factory=Noted)
    untrained: Noted = field(default_factory=Noted)
    num_hidden_rows: int = 0
    long: Noted = field(default_factory=Noted)
    bos_doubled: Noted = field(default_factory=Noted)
    empty_answers: Noted = field(default_factory=Noted)
    control_text: Noted = field(default_factory=Noted)
    unread: dict[str, Noted] = field(default_factory=dict)
    personal: dict[PersonalKind, Noted] = field(default_factory=dict)
    num_personal_rows: int = 0
    redacted: Counter[PersonalKind] = field(default_factory=Counter)
    num_answers: int = 0
    unended: Noted = field(default_factory=Noted)
    turns: Counter[int] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    num_tokens: int = 0
    num_trained_tokens: int = 0
    num_sequences: int = 0
    num_packed: int = 0
    keys: array[int] = field(default_factory=lambda: array("Q"))
    answers: array[int] = field(default_factory=lambda: array("Q"))
    num_pairs: int = 0
    longer_chosen: Noted = field(default_factory=Noted)
    longer_rejected: Noted = field(default_factory=Noted)
    good: Noted = field(default_factory=Noted)
    bad: Noted = field(default_factory=Noted)
    window: list[int] = field(default_factory=list)
    num_window_rows: int = 0
    num_window_tokens: int = 0

    def close_window(self) -> None:
        """Count the sequences of a window as `data/shards/pack.py` would make them."""
        num_bins = len(plan_bins(self.window, self.request.seq_len * self.request.rows_per_slot))
        self.num_packed += num_bins
        self.num_sequences += num_bins if self.request.packing else len(self.window)
        self.window.clear()
        self.num_window_rows = self.num_window_tokens = 0


@dataclass(frozen=True)
class Measures:
    """Holds the counts of a run's data.

    Attributes:
        splits: Training sources in order, then the held-out split.
        repeats: Training rows that equal an earlier one, as `place equals place`.
        eval_repeats: Held-out rows that equal an earlier held-out row.
        overlap: Held-out rows that equal a training row.
        stops: Tokens at which generation ends.
        near: Training rows that are similar but not equal to an earlier one.
        leaks: Held-out rows that are similar but not equal to a training row.
        repeated_answers: Training rows whose answer many other rows share; the first row of each answer.
    """

    splits: list[SplitCounts]
    repeats: Noted
    eval_repeats: Noted
    overlap: Noted
    stops: list[str]
    near: Noted = field(default_factory=Noted)
    leaks: Noted = field(default_factory=Noted)
    repeated_answers: Noted = field(default_factory=Noted)


def measure(config: Config) -> Measures:
    """Read and render every row once; a second reading finds the locations of the first few equal rows.

    Raises:
        UserError: The tokenizer, or a source as a whole, cannot be read.
    """
    config = with_fraction(config)
    tokenizer = load_tokenizer(config)
    render_many, render_key = make_renderer(config, tokenizer)
    curation = curate(config, list_sources(config.data), open_store(cache_address(config)))
    train, held_out = split_requests(config, render_key, curation)
    trained_on = [SplitCounts(f"train.{index}", request) for index, request in enumerate(train)]
    evaluated = [SplitCounts("eval", held_out)] if held_out is not None else []
    stops = stop_tokens(tokenizer, load_generation_config(config))
    meter = _Meter(tokenizer, stops, config.data.redact)
    signatures = _scan(trained_on, render_many, meter)
    eval_signatures = _scan(evaluated, render_many, meter)
    shared = find_shared(_all_keys(evaluated), _all_keys(trained_on))
    near = find_near(signatures, _distinct(trained_on), NEAR)
    here, there = find_near_shared(eval_signatures, signatures, NEAR)
    is_other = ~np.isin(here, shared[0])
    return Measures(
        splits=[*trained_on, *evaluated],
        repeats=_note_repeats(trained_on),
        eval_repeats=_note_repeats(evaluated),
        overlap=_note_pairs(evaluated, trained_on, *shared, "equals"),
        stops=[str(token) for token in tokenizer.convert_ids_to_tokens(sorted(stops))],
        near=_note_pairs(trained_on, trained_on, *near, "is like"),
        leaks=_note_pairs(evaluated, trained_on, here[is_other], there[is_other], "is like"),
        repeated_answers=_note_answers(trained_on),
    )


class _Meter:
    """Counts what it finds in rows."""

    def __init__(self, tokenizer: Tokenizer, stops: set[int], redacted: Sequence[PersonalKind]) -> None:
        self._redacted = frozenset(redacted)
        self._stops = stops
        self._bos = tokenizer.bos_token_id
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._special = re.compile("|".join(map(re.escape, special)) or r"(?!)")

    def note(self, row: Row, samples: list[Sample] | BadRow, split: SplitCounts) -> None:
        """Count a row and its rendered samples."""
        split.num_rows += 1
        for key in row.unread:
            if key in split.unread or len(split.unread) < MAX_UNREAD:
                split.unread.setdefault(key, Noted()).add(row.place)
        split.keys.append(record_key(row.record))
        answer = " ".join(row.record.answer_text().split())
        is_long = len(answer) >= _MIN_ANSWER
        split.answers.append(xxhash.xxh3_64_intdigest(answer.encode("utf-8", "surrogatepass")) if is_long else 0)
        split.turns[row.record.num_turns or 0] += 1
        found = {
            one.kind: text[one.start : one.end] for _, text in row.record.role_texts() for one in find_personal(text)
        }
        for kind in found.keys() - self._redacted:
            split.personal.setdefault(kind, Noted()).add(f"{row.place}: {mask(kind, found[kind])}")
        split.num_personal_rows += not found.keys() <= self._redacted
        split.redacted.update(found.keys() & self._redacted)
        if row.record.has_empty_answer():
            split.empty_answers.add(row.place)
        if isinstance(samples, BadRow):
            split.refused.add(f"{row.place}: {samples.problem}")
            return
        if special := next(filter(None, map(self._special.search, row.record.templated_texts())), None):
            split.control_text.add(f"{row.place}: {special[0]}")
        if isinstance(row.record, Labelled):
            (split.good if row.record.label else split.bad).add(row.place)
        pieces = [self._note_sample(sample, row.place, split) for sample in samples]
        wanted = split.request.samples_per_record
        is_whole = wanted is None or [len(some) for some in pieces] == [1] * wanted
        used = [piece for some in pieces for piece in some] if is_whole else []
        if isinstance(row.record, Preference) and len(used) == 2:
            split.num_pairs += 1
            difference = len(samples[0].input_ids) - len(samples[1].input_ids)
            if difference:
                (split.longer_chosen if difference > 0 else split.longer_rejected).add(row.place)
        is_any_long = any(len(sample.input_ids) > split.request.seq_len for sample in samples)
        if not used and not (is_any_long and split.request.long_samples == "drop"):
            split.untrained.add(row.place)
            split.num_hidden_rows += any(any(sample.trained[1:]) for sample in samples)
        lengths = [len(piece.input_ids) for piece in used]
        # Of a labelled answer the mismatched one is counted as long as itself.
        split.window += (
            lengths if wanted is None else [sum(lengths) * split.request.rows_per_slot // wanted] * bool(used)
        )
        split.num_window_rows += 1
        split.num_window_tokens += sum(len(piece.input_ids) for piece in used)
        if is_window_full(split.num_window_rows, split.num_window_tokens):
            split.close_window()

    def _note_sample(self, sample: Sample, place: str, split: SplitCounts) -> list[Sample]:
        request, length = split.request, len(sample.input_ids)
        split.lengths[length] += 1
        if length > request.seq_len:
            split.long.add(f"{place}: {length:,} tokens")
        if self._bos is not None and sample.input_ids[:2] == [self._bos, self._bos]:
            split.bos_doubled.add(place)
        pieces = usable(sample, request)
        split.num_tokens += sum(len(piece.input_ids) for piece in pieces)
        split.num_trained_tokens += sum(sum(piece.trained[1:]) for piece in pieces)
        num_used = length if request.long_samples == "split" else request.seq_len
        for end in answer_ends(sample) if pieces else ():
            if end < num_used:
                split.num_answers += 1
                if sample.input_ids[end] not in self._stops:
                    split.unended.add(place)
        return pieces


def answer_ends(sample: Sample) -> list[int]:
    """Return where each run of trained tokens ends."""
    return [i for i, (here, after) in enumerate(pairwise([*sample.trained, False])) if here and not after]


def _scan(splits: Sequence[SplitCounts], render_many: RenderMany, meter: _Meter) -> Signatures:
    """Count all rows and return the signatures of the readable rows, in order."""
    signatures = SignatureFile()
    for split in splits:
        for shard in plan_split(split.request).shards:
            for row, samples in render_rows(rows_of_shard(split.request, shard), render_many):
                if isinstance(row, BadRow):
                    split.unreadable.add(f"{row.place}: {row.problem}")
                else:
                    meter.note(row, samples, split)
                    signatures.add(compared_text(row.record))
            split.close_window()
    return signatures.read()


def _note_repeats(splits: Sequence[SplitCounts]) -> Noted:
    return _note_pairs(splits, splits, *find_repeats(_all_keys(splits)), "equals")


def _note_answers(splits: Sequence[SplitCounts]) -> Noted:
    """Count rows by their answers; equal rows count once."""
    answers = np.concatenate([np.frombuffer(split.answers, np.uint64) for split in splits])
    rows = _distinct(splits)
    rows = rows[answers[rows] != 0]
    _, firsts, counts = np.unique(answers[rows], return_index=True, return_counts=True)
    often = np.flatnonzero(counts >= REPEATS)
    often = often[np.lexsort((firsts[often], -counts[often]))]
    places = _places(splits, rows[firsts[often[:FEW]]].tolist())
    shown = [f"{place} and {count - 1:,} more" for place, count in zip(places, counts[often].tolist(), strict=False)]
    return Noted(int(counts[often].sum()), shown)


def _distinct(splits: Sequence[SplitCounts]) -> Numbers:
    """Return the rows that do not equal an earlier one."""
    keys = _all_keys(splits)
    return np.setdiff1d(np.arange(len(keys)), find_repeats(keys)[0], assume_unique=True)


def _all_keys(splits: Sequence[SplitCounts]) -> Keys:
    return np.concatenate([np.frombuffer(split.keys, dtype=np.uint64) for split in splits] or [np.zeros(0, np.uint64)])


def _note_pairs(
    splits: Sequence[SplitCounts], others: Sequence[SplitCounts], here: Numbers, there: Numbers, how: str
) -> Noted:
    left = _places(splits, here[:FEW].tolist())
    right = _places(others, there[:FEW].tolist())
    return Noted(len(here), [f"{a} {how} {b}" for a, b in zip(left, right, strict=True)])


def _places(splits: Sequence[SplitCounts], numbers: list[int]) -> list[str]:
    """Return the locations of rows, given by number over all splits; read the rows again up to the last one."""
    found: dict[int, str] = {}
    first = 0
    for split in splits:
        wanted = {number - first for number in numbers if 0 <= number - first < len(split.keys)}
        if wanted:
            rows = (row for row in rows_of_split(plan_split(split.request)) if isinstance(row, Row))
            for number, row in enumerate(rows):
                if number in wanted:
                    found[first + number] = row.place
                if number >= max(wanted):
                    break
        first += len(split.keys)
    return [found[number] for number in numbers]
