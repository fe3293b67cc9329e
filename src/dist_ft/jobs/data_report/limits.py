"""Checks the limits of `data.limits`: a measure that exceeds a limit is an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from dist_ft.config.data_sections import LimitsConfig
from dist_ft.jobs.data_report.measure import Measures, SplitCounts
from dist_ft.jobs.data_report.summary import Finding, Noted


def limit_problems(limits: LimitsConfig, measures: Measures) -> Iterator[Finding]:
    """Yield an error for every limit that is exceeded, with its key, the limit and the measured share."""
    evaluated = [split for split in measures.splits if split.name == "eval"]
    num_trained_on = sum(split.num_rows for split in measures.splits if split.name != "eval")
    for key, limit in limits.model_dump().items():
        found: list[tuple[str, Noted, int]] = []
        if key in _OF_SPLIT:
            found = [(split.name, *_OF_SPLIT[key](split)) for split in measures.splits]
        elif key in _OF_ALL:
            found = [("train", _OF_ALL[key](measures), num_trained_on)]
        elif evaluated:
            leaked = _join(measures.overlap.count + measures.leaks.count, [measures.overlap, measures.leaks])
            found = [("eval", leaked, evaluated[0].num_rows)]
        for split_name, noted, total in found if limit is not None else ():
            share = noted.count / max(1, total)
            if share > limit:
                message = (
                    f"data.limits.{key}={limit:g} is exceeded: {_WHAT[key]} {noted.count:,} of {total:,} ({share:.2%})"
                )
                yield Finding("error", split_name, message, noted.count, noted.first)


_WHAT = {
    "exact_copies": "rows that equal an earlier one are", "near_copies": "rows that are alike an earlier one are",
    "leaked": "held-out rows that are trained on or nearly so are",
    "personal": "rows with personal data or secrets are",
    "untrained": "rows without a trained token are", "long": "samples beyond data.seq_len are",
    "bad": "rows that cannot be used are", "empty_answers": "rows with an empty answer are",
    "repeated_answers": "rows with an answer that many give are",
    "one_sided_lengths": "pairs whose longer answer is on the same side are",
    "one_sided_labels": "answers with the more frequent label are",
}  # fmt: skip
_OF_SPLIT: dict[str, Callable[[SplitCounts], tuple[Noted, int]]] = {
    "personal": lambda split: (_join(split.num_personal_rows, list(split.personal.values())), split.num_rows),
    "untrained": lambda split: (split.untrained, split.num_rows),
    "long": lambda split: (split.long, split.lengths.total()),
    "bad": lambda split: (
        _join(split.unreadable.count + split.refused.count, [split.unreadable, split.refused]),
        split.num_rows + split.unreadable.count,
    ),
    "empty_answers": lambda split: (split.empty_answers, split.num_rows),
    "one_sided_lengths": lambda split: (_more(split.longer_chosen, split.longer_rejected), split.num_pairs),
    "one_sided_labels": lambda split: (_more(split.good, split.bad), split.good.count + split.bad.count),
}
_OF_ALL: dict[str, Callable[[Measures], Noted]] = {
    "exact_copies": lambda measures: measures.repeats,
    "near_copies": lambda measures: measures.near,
    "repeated_answers": lambda measures: measures.repeated_answers,
}


def _more(one: Noted, other: Noted) -> Noted:
    return one if one.count >= other.count else other


def _join(count: int, parts: Sequence[Noted]) -> Noted:
    return Noted(count, [place for part in parts for place in part.first][:5])
