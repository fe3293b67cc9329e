"""What follows from the measures of data: severity and words of each finding."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_ft.config.data_sections import RowSource
from dist_ft.data.shards.request import SplitRequest
from dist_ft.jobs.data_report.findings import check_data, find_problems, quantile
from dist_ft.jobs.data_report.measure import Measures, SplitCounts
from dist_ft.jobs.data_report.summary import Noted
from tests.helpers.configs import tiny_config


def noted(count: int) -> Noted:
    return Noted(count, [f"a.jsonl:{n}" for n in range(1, 1 + min(count, 5))])


def split_of(name: str = "train.0", request: dict[str, Any] | None = None, **changes: Any) -> SplitCounts:
    """A split with nothing to complain of."""
    counts: dict[str, Any] = {
        "num_rows": 1000, "lengths": Counter({40: 500, 100: 500}), "num_answers": 1000, "num_tokens": 70_000,
        "num_trained_tokens": 20_000, "num_sequences": 600, "num_packed": 600,
    }  # fmt: skip
    return SplitCounts(
        name, SplitRequest((RowSource(source="a.jsonl"),), 128, True, "k", **(request or {})), **{**counts, **changes}
    )


def found(split: SplitCounts, **changes: Any) -> list[tuple[str, str, str, int]]:
    settings: dict[str, Any] = {"repeats": Noted(), "eval_repeats": Noted(), "overlap": Noted(), **changes}
    measures = Measures(splits=[split, split_of("eval", num_rows=100)], stops=["<|im_end|>"], **settings)
    return [(f.severity, f.split, f.message, f.count) for f in find_problems(measures)]


def test_good_data_has_no_finding() -> None:
    assert found(split_of()) == []


@pytest.mark.parametrize(
    ("changes", "severity", "says"),
    [
        ({"unreadable": noted(3)}, "error", "3 rows cannot be read"),
        ({"unreadable": noted(1)}, "error", "1 row cannot be read"),
        ({"refused": noted(2)}, "error", "template refuses 2 rows.*data.chat_template"),
        ({"untrained": noted(9), "num_trained_tokens": 0}, "error", "not one token.*data.seq_len=128"),
        ({"untrained": noted(9)}, "warning", r"9 rows; give them an answer"),
        ({"untrained": noted(9), "num_hidden_rows": 4}, "warning", r"9 rows \(4 because data.seq_len=128 cuts"),
        ({"long": noted(10)}, "note", r"seq_len=128 and cut at the end: 10 samples \(1.0%\).*longest has 100 tokens"),
        ({"long": noted(11)}, "warning", r"11 samples \(1.1%\)"),
        ({"unended": noted(1000)}, "warning", r"1,000 of 1,000 answers lack.*<\|im_end\|>.*chat template"),
        ({"unended": noted(1)}, "warning", "1 of 1,000 answers lack"),
        ({"bos_doubled": noted(7)}, "warning", "two BOS tokens begin 7 samples"),
        ({"control_text": noted(7)}, "warning", "text of 7 rows holds special tokens"),
        ({"empty_answers": noted(7)}, "warning", "empty answers in 7 rows"),
        ({"num_packed": 300}, "note", "data.packing=true would make 300 sequences of 600"),
        ({"num_pairs": 10, "longer_chosen": noted(9)}, "warning", r"chosen answer is the longer one in 9 of 10 pairs"),
        ({"num_pairs": 20, "longer_rejected": noted(17)}, "warning", r"rejected answer .* 17 of 20 .*sigmoid_norm"),
        ({"good": Noted(20), "bad": Noted(14)}, "note", "20 good answers, 14 bad ones; set objective.desirable"),
    ],
)
def test_a_finding_says_what_and_what_to_do(changes: dict[str, Any], severity: str, says: str) -> None:
    ((how_bad, split, message, count),) = found(split_of(**changes))
    assert (how_bad, split) == (severity, "train.0")
    assert re.search(says, message), message
    assert "\n" not in message
    value = next((v.count for key, v in changes.items() if isinstance(v, Noted) and key not in ("good", "bad")), 0)
    assert count == value


@pytest.mark.parametrize(
    ("request_", "changes", "severity", "says"),
    [
        ({"bad_rows": "skip"}, {"unreadable": noted(3)}, "warning", "3 rows cannot be read and would be left out"),
        ({"bad_rows": "skip"}, {"refused": noted(3)}, "warning", "3 rows, which would be left out"),
        ({"long_samples": "error"}, {"long": noted(1)}, "error", "what stops a run: 1 sample"),
        ({"long_samples": "drop"}, {"long": noted(20)}, "warning", "left out: 20 samples"),
        ({"long_samples": "split"}, {"long": noted(900)}, "note", "made into pieces: 900 samples"),
    ],
)
def test_the_policies_of_the_config_decide_how_bad_it_is(
    request_: dict[str, Any], changes: dict[str, Any], severity: str, says: str
) -> None:
    ((how_bad, _, message, _),) = found(split_of(request=request_, **changes))
    assert how_bad == severity
    assert says in message


def test_a_split_without_rows_is_an_error() -> None:
    empty = split_of(num_rows=0, lengths=Counter(), num_trained_tokens=0, num_sequences=0, num_packed=0)
    assert [(severity, message) for severity, _, message, _ in found(empty)] == [
        ("error", "no rows; name another source")
    ]


@pytest.mark.parametrize(
    ("changes", "split", "severity", "says"),
    [
        ({"repeats": noted(10)}, "train", "note", "10 (1.0%)"),
        ({"repeats": noted(11)}, "train", "warning", "11 (1.1%)"),
        ({"eval_repeats": noted(2)}, "eval", "warning", "2 (2.0%)"),
        ({"overlap": noted(1)}, "eval", "warning", "holds 1 of 100 held-out rows"),
    ],
)
def test_equal_rows_are_weighed_by_their_share(changes: dict[str, Any], split: str, severity: str, says: str) -> None:
    ((how_bad, where, message, count),) = found(split_of(), **changes)
    assert (where, how_bad, count) == (split, severity, next(iter(changes.values())).count)
    assert says in message


def test_errors_come_first() -> None:
    bad = split_of(unreadable=noted(1), long=noted(1), empty_answers=noted(1))
    assert [severity for severity, *_ in found(bad, repeats=noted(500))] == ["error", "warning", "warning", "note"]


@given(st.lists(st.integers(0, 9), min_size=1), st.floats(0.01, 1))
def test_quantiles_are_those_of_the_sorted_values(values: list[int], share: float) -> None:
    rank = math.ceil(share * len(values))
    assert quantile(Counter(values), share) == sorted(values)[rank - 1]


def test_the_report_is_json_and_has_the_numbers(tmp_path: Path) -> None:
    found = check_data(tiny_config(tmp_path, data__packing=True))
    report = json.loads(json.dumps(asdict(found)))
    assert list(report) == [
        "run", "seq_len", "packing", "stop_tokens", "splits", "repeated_rows", "repeated_eval_rows", "overlap",
        "near_copies", "near_overlap", "repeated_answers", "cost", "findings",
    ]  # fmt: skip
    train, held_out = report["splits"]
    assert (train["rows"], held_out["rows"], report["findings"]) == (41, 7, [])
    assert train["turns"] == {"2": 41}
    assert train["packing_efficiency"] == pytest.approx(train["tokens"] / train["sequences"] / 96, abs=1e-4)
    assert train["trained_share"] == pytest.approx(train["trained_tokens"] / train["tokens"], abs=1e-4)
