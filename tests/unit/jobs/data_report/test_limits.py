"""Limits of the config: which are exceeded, and by how much."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from dist_ft.config.data_sections import LimitsConfig, RowSource
from dist_ft.data.shards.request import SplitRequest
from dist_ft.jobs.data_report.limits import limit_problems
from dist_ft.jobs.data_report.measure import Measures, SplitCounts
from dist_ft.jobs.data_report.summary import Noted


def noted(count: int) -> Noted:
    return Noted(count, [f"a.jsonl:{n}" for n in range(min(count, 5))])


def measures_of(counts: dict[str, Any] | None = None, **changes: Any) -> Measures:
    request = SplitRequest((RowSource(source="a.jsonl"),), 128, True, "k")
    base: dict[str, Any] = {"num_rows": 100, "lengths": Counter({40: 200})}
    splits = [SplitCounts("train.0", request, **{**base, **(counts or {})}), SplitCounts("eval", request, num_rows=50)]
    none: dict[str, Any] = {"repeats": Noted(), "eval_repeats": Noted(), "overlap": Noted(), "stops": []}
    return Measures(splits=splits, **{**none, **changes})


CASES: list[tuple[str, dict[str, Any], dict[str, Any], str, str]] = [
    ("exact_copies", {}, {"repeats": noted(10)}, "train", "10 of 100 (10.00%)"),
    ("near_copies", {}, {"near": noted(10)}, "train", "10 of 100 (10.00%)"),
    ("leaked", {}, {"overlap": noted(2), "leaks": noted(3)}, "eval", "5 of 50 (10.00%)"),
    ("personal", {"personal": {"email": noted(10)}, "num_personal_rows": 10}, {}, "train.0", "10 of 100 (10.00%)"),
    ("untrained", {"untrained": noted(10)}, {}, "train.0", "10 of 100 (10.00%)"),
    ("long", {"long": noted(20)}, {}, "train.0", "20 of 200 (10.00%)"),
    ("bad", {"num_rows": 90, "unreadable": noted(10)}, {}, "train.0", "10 of 100 (10.00%)"),
    ("bad", {"refused": noted(10)}, {}, "train.0", "10 of 100 (10.00%)"),
    ("empty_answers", {"empty_answers": noted(10)}, {}, "train.0", "10 of 100 (10.00%)"),
    ("one_sided_lengths", {"num_pairs": 100, "longer_rejected": noted(10)}, {}, "train.0", "10 of 100 (10.00%)"),
    ("repeated_answers", {}, {"repeated_answers": noted(10)}, "train", "10 of 100 (10.00%)"),
]


@pytest.mark.parametrize(("key", "counts", "changes", "split", "says"), CASES, ids=[case[0] for case in CASES])
def test_a_limit_is_exceeded_by_more_than_its_share(
    key: str, counts: dict[str, Any], changes: dict[str, Any], split: str, says: str
) -> None:
    measures = measures_of(counts, **changes)
    assert list(limit_problems(LimitsConfig.model_validate({key: 0.1}), measures)) == []
    (found,) = limit_problems(LimitsConfig.model_validate({key: 0.09}), measures)
    assert (found.severity, found.split) == ("error", split)
    assert found.message.startswith(f"data.limits.{key}=0.09 is exceeded: ")
    assert found.message.endswith(says)
    assert found.places and found.count == int(says.split()[0])


def test_no_limit_was_forgotten_in_the_table_above() -> None:
    assert {case[0] for case in CASES} | {"one_sided_labels"} == set(LimitsConfig.model_fields)


def test_labels_that_agree_exceed_their_limit() -> None:
    measures = measures_of({"good": noted(7), "bad": noted(3)})
    assert list(limit_problems(LimitsConfig(one_sided_labels=0.7), measures)) == []
    (found,) = limit_problems(LimitsConfig(one_sided_labels=0.69), measures)
    assert found.message.endswith("answers with the more frequent label are 7 of 10 (70.00%)")


def test_without_limits_nothing_is_an_error() -> None:
    assert list(limit_problems(LimitsConfig(), measures_of({"untrained": noted(100)}, near=noted(100)))) == []


def test_a_limit_of_zero_allows_none_and_holds_where_there_is_none() -> None:
    limits = LimitsConfig.model_validate(dict.fromkeys(LimitsConfig.model_fields, 0.0))
    assert list(limit_problems(limits, measures_of())) == []
    assert len(list(limit_problems(limits, measures_of(near=noted(1))))) == 1


@pytest.mark.parametrize("count", range(101))
def test_what_is_just_at_its_limit_does_not_exceed_it(count: int) -> None:
    limits = LimitsConfig.model_validate({"untrained": count / 100})
    assert list(limit_problems(limits, measures_of({"untrained": noted(count)}))) == []
